"""Pass over batches until every batch norm normalizes with exact statistics."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial, reduce
from typing import Any

import jax
import numpy as np

from jaxbn.calibrate._observe import ObservableModel, PerCall
from jaxbn.calibrate._observe_batch import BatchObserver
from jaxbn.calibrate._statistics import Statistics, merge_statistics


def repeatable(batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches that can be iterated over several times, copying an iterator into a list."""
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches must be a list of batches, got a {type(batches).__name__}: put a single "
            f"batch into a list."
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def exhausted() -> ValueError:
    """Return the error for batches that are empty in the second pass."""
    return ValueError(
        "batches were exhausted by the first pass over them: give a list, or an iterable that "
        "starts again with each iter()."
    )


def exact_statistics(
    model: ObservableModel, batches: Iterable[Any]
) -> tuple[PerCall[Statistics], BatchObserver]:
    """Return the statistics of each call in one training step on all batches as one batch.

    Each call normalizes with its statistics over all batches. Each pass makes those of one more
    layer exact: its input depends on the statistics of the layers before it.

    Args:
      model: the model. If any of its layers runs in training mode, only such layers are observed.
      batches: `repeatable` batches. They are iterated over once for each pass.

    Returns:
      The statistics, and the function that observed them.
    """
    observe, known = _first_pass(model, batches)
    passes = 1
    while passes < sum(call.ddof.size for calls in known.values() for call in calls):
        before, known = known, reduce(_merge_calls, map(partial(observe, known), batches), {})
        passes += 1
        if not known:
            raise exhausted()
        if _equal(known, before):
            break
    return known, observe


def _first_pass(
    model: ObservableModel, batches: Iterable[Any]
) -> tuple[BatchObserver, PerCall[Statistics]]:
    """Observe the calls in training mode, or all calls if none is in training mode."""
    observe_training, observe_all = BatchObserver(model, False), BatchObserver(model, True)
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
            "model must call a batch norm of jaxbn.linen, flax.linen, jaxbn.nnx or flax.nnx that "
            "is not frozen, got a model that calls none."
        )
    return (observe_training, in_training) if in_training else (observe_all, in_all_modes)


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
