"""Pass over batches until every batch norm normalizes with exact statistics."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from itertools import zip_longest
from typing import Any

import jax
import numpy as np

from jaxbn.calibrate._batches import join, split
from jaxbn.calibrate._observe import CallMoments, ObservableModel, PerCall
from jaxbn.calibrate._statistics import Statistics, merge_statistics

# Takes statistics to normalize with and a batch, and returns the statistics of the batch's calls.
ObserveBatch = Callable[[PerCall[Statistics], Any], PerCall[Statistics]]


def exact_statistics(model: ObservableModel, batches: Iterable[Any]) -> PerCall[Statistics]:
    """Return the statistics of each call in one training step on all batches, as one batch.

    Each call normalizes with its statistics over all batches. Each pass makes those of one more
    layer exact: its input depends on the statistics of the layers before it.

    Args:
      model: the model. If any of its layers runs in training mode, only such layers are observed.
      batches: an iterable of batches. It is iterated over once for each pass; an iterator is first
        copied into a list.
    """
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches must be a list of batches, got a {type(batches).__name__}: put a single "
            f"batch into a list."
        )
    if isinstance(batches, Iterator):
        batches = list(batches)
    observe, known = _first_pass(model, batches)
    passes = 1
    while passes < sum(call.ddof.size for calls in known.values() for call in calls):
        before, known = known, reduce(_merge_calls, map(partial(observe, known), batches), {})
        passes += 1
        if not known:
            raise ValueError(
                "batches were exhausted by the first pass over them: give a list, or an iterable "
                "that starts again with each iter()."
            )
        if _equal(known, before):
            break
    return known


def _first_pass(
    model: ObservableModel, batches: Iterable[Any]
) -> tuple[ObserveBatch, PerCall[Statistics]]:
    """Observe the calls in training mode, or all calls if none is in training mode."""
    observe_training, observe_all = _observe_batch(model, False), _observe_batch(model, True)
    in_training: PerCall[Statistics] = {}
    in_all_modes: PerCall[Statistics] = {}
    batch = None
    for batch in batches:
        in_training = _merge_calls(in_training, observe_training({}, batch))
        if not in_training:
            in_all_modes = _merge_calls(in_all_modes, observe_all({}, batch))
    if batch is None:
        raise ValueError("batches must hold at least one batch, got none.")
    if not (in_training or in_all_modes):
        raise ValueError(
            "model must have a batch norm of jaxbn.linen, flax.linen, jaxbn.nnx or flax.nnx that "
            "is not frozen, and call it; got one that calls none."
        )
    return (observe_training, in_training) if in_training else (observe_all, in_all_modes)


def _observe_batch(model: ObservableModel, every_call: bool) -> ObserveBatch:
    def run(variables, prescribed, arrays, constants):
        return model.observe(variables, prescribed, join(arrays, constants), every_call)

    compiled = jax.jit(run, static_argnums=3)

    def observe(known: PerCall[Statistics], batch: Any) -> PerCall[Statistics]:
        arrays, constants = split(batch)
        # Exactly the calls of this batch get prescribed moments, in every pass, so that the model
        # is compiled once for each shape.
        shapes = compiled.eval_shape(model.variables, {}, arrays, constants)
        if not shapes:
            return {}
        prescribed = {
            layer: tuple(
                _to_moments(statistics, shape)
                for statistics, shape in zip_longest(known.get(layer, ())[: len(calls)], calls)
            )
            for layer, calls in shapes.items()
        }
        observed = compiled(model.variables, prescribed, arrays, constants)
        return {layer: tuple(map(_from_moments, calls)) for layer, calls in observed.items()}

    return observe


def _merge_calls(a: PerCall[Statistics], b: PerCall[Statistics]) -> PerCall[Statistics]:
    """Merge the statistics of each call. Either may have layers and calls that the other lacks."""

    def merge_layer(a: tuple[Statistics, ...], b: tuple[Statistics, ...]) -> Any:
        shared = tuple(map(merge_statistics, a, b))
        return shared + (a[len(shared) :] or b[len(shared) :])

    return {layer: merge_layer(a.get(layer, ()), b.get(layer, ())) for layer in {**a, **b}}


def _equal(a: PerCall[Statistics], b: PerCall[Statistics]) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def _from_moments(observed: CallMoments) -> Statistics:
    n, high, low, var = (np.asarray(value, np.float64) for value in observed[:4])
    return Statistics(n, high + low, var, np.asarray(observed.ddof))


def _to_moments(statistics: Statistics | None, shape: Any) -> CallMoments:
    """Return moments to prescribe, their mean as an unevaluated sum of two floats.

    Without statistics, they are moments of no values.

    Args:
      statistics: the statistics of the call so far, or None.
      shape: shapes and dtypes of the result, a `CallMoments`.
    """
    dtype = shape.var.dtype
    if statistics is None:
        zeros = np.zeros(shape.var.shape, dtype)
        return CallMoments(zeros, zeros, zeros, zeros, np.zeros(shape.ddof.shape, shape.ddof.dtype))
    n, mean, var, ddof = statistics
    with np.errstate(over="ignore", invalid="ignore"):
        high = mean.astype(dtype)
        low = (mean - high).astype(dtype)
        return CallMoments(n.astype(dtype), high, low, var.astype(dtype), ddof)
