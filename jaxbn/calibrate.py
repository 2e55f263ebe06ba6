"""Exact running statistics of a whole data set, and of shards put together."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, reduce
from itertools import zip_longest
from typing import Any, TypeVar

import jax
import numpy as np

from jaxbn._batches import join, split
from jaxbn._merge import merge
from jaxbn._pooling import Statistics, layers_of, merged, to_state, where
from jaxbn._watch import Model, Network, Observed, as_function

__all__ = ["merge", "recalibrate"]

Tree = TypeVar("Tree")
# Maps what is known of each call so far, and a batch, to what the calls of the batch observe.
Pass = Callable[[Network[Statistics], Any], Network[Statistics]]


def recalibrate(model: Any, variables: Tree, batches: Iterable[Any], **apply_kwargs: Any) -> Tree:
    r"""Return the variables with the exact running statistics of a whole data set.

    Each batch norm's mean and variance become those of its input in one training step over all
    batches at once, as one batch: its input comes from a network whose earlier layers normalize
    with the statistics of the whole. The result does not depend on how the data is cut into
    batches, as long as nothing else in the network is random or mixes examples. With
    :math:`n_i` values, mean :math:`\mu_i` and biased variance :math:`\sigma_i^2` in batch
    :math:`i`, those of the whole are

    .. math::

        n = \sum_i n_i, \quad \mu = \frac{1}{n} \sum_i n_i \mu_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i n_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)

    summed in float64. This is not the mean of the variances. A layer whose `running_variance` is
    "unbiased" gets :math:`\sigma^2 n / (n - 1)`.

    Use it when the running statistics no longer match the weights: after averaging (SWA, EMA),
    quantization or pruning, or on a new domain.

    The data is passed over once for each batch norm on the longest path through the network: each
    pass makes the next layer's statistics exact. The passes end when one changes nothing, or after
    as many as there are calls of batch norms.

    Layers are `jaxbn.linen.BatchNorm`, `jaxbn.nnx.BatchNorm`, Flax's own two, and classes that
    inherit from them. If a layer runs in training mode, in any batch, then the layers in training
    mode are calibrated, and frozen ones normalize with their running statistics and keep them. If
    all run in evaluation mode, all are calibrated, and whatever else depends on the mode, such as
    dropout, behaves as in evaluation. `axis_name` and `virtual_batch_size` have no effect: the
    whole is one batch.

    A layer that is called several times normalizes each call with the statistics of that call, as
    in training, and keeps those of all together. Batches may call a layer different numbers of
    times, or not at all, as sequences of different lengths do: the statistics of, say, third calls
    are those of the batches that make one. Calls of different layers must come in the same order in
    all batches. Calls inside a loop or branch of JAX that carries the statistics, such as `nn.scan`
    with `variable_carry="batch_stats"`, cannot be told apart, and raise an error. `nn.scan` over
    layers, each with its own statistics, works.

    Args:
      model: a `flax.linen.Module`; or an `flax.nnx.Module` or `flax.nnx.GraphDef`. It is not
        changed.
      variables: those of a Linen model, or an `nnx.State`, such as `nnx.state(model)` or, where the
        model is a `Module`, only its `BatchStat`. They are not changed.
      batches: what the model is called with, each an array; or a tuple of positional arguments,
        such as an input and its mask; or a dict of keyword arguments. What is not an array, such as
        a bool, is passed as it is, and the model is compiled for each of its values. Empty batches
        count for nothing. `batches` is iterated over several times, so the batches of an iterator
        are kept in a list.
      **apply_kwargs: further arguments of `model.apply`, or of the NNX model, such as `train=True`
        or `rngs`. `mutable` has no effect.

    Returns:
      Variables of the same structure, shapes and dtypes. Only `mean` and `var` of batch norms
      differ, in features with a value that counts, or two for an unbiased variance. `count`, the
      number of training batches, is unchanged.

    Raises:
      TypeError: `model` or `variables` are of another kind, or `batches` is a mapping.
      ValueError: there is no batch, no batch norm, or no value; one value per feature, for which no
        unbiased variance exists; statistics that are not finite; a batch norm in a loop that
        carries its statistics.

    Example:
      >>> import flax.linen as nn, jax, jaxbn.linen
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (1000, 4))
      >>> model = nn.Sequential([nn.Dense(8), jaxbn.linen.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(1), x)
      >>> variables = recalibrate(model, variables, [x[:300], x[300:]])
      >>> y = model.apply(variables, x)
      >>> print(f"{abs(y.mean()):.2f} {y.std():.2f}")
      0.00 1.00

    Source: the formula is that of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979; one use is section 3.2 of Izmailov et al.,
    "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.
    """
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches must be a list of batches, got a {type(batches).__name__}: put a single "
            f"batch into a list."
        )
    if isinstance(batches, Iterator):
        batches = list(batches)
    watched = as_function(model, variables, apply_kwargs)
    observe, known = _first_pass(watched, batches)
    passes = 1
    while passes < sum(call.ddof.size for calls in known.values() for call in calls):
        before, known = known, reduce(_union, map(partial(observe, known), batches), {})
        passes += 1
        if not known:
            raise ValueError(
                "batches were used up by the first pass over them: give a list, or an iterable "
                "that begins anew with each iter()."
            )
        if _equal(known, before):
            break
    return watched.with_statistics(_written(watched.statistics, known))


def _first_pass(model: Model, batches: Iterable[Any]) -> tuple[Pass, Network[Statistics]]:
    """Find out which layers to observe, all or those that train, and what they observe."""
    train_only, every = _observer(model, everywhere=False), _observer(model, everywhere=True)
    training: Network[Statistics] = {}
    all_modes: Network[Statistics] = {}
    batch = None
    for batch in batches:
        training = _union(training, train_only({}, batch))
        if not training:
            all_modes = _union(all_modes, every({}, batch))
    if batch is None:
        raise ValueError("batches must hold at least one batch, got none.")
    if not (training or all_modes):
        raise ValueError(
            "model must have a batch norm of jaxbn.linen, flax.linen, jaxbn.nnx or flax.nnx, and "
            "call it; got one that calls none."
        )
    return (train_only, training) if training else (every, all_modes)


def _observer(model: Model, everywhere: bool) -> Pass:
    def run(variables, given, arrays, constants):
        return model.observe(variables, given, join(arrays, constants), everywhere)

    compiled = jax.jit(run, static_argnums=3)

    def observe(known: Network[Statistics], batch: Any) -> Network[Statistics]:
        arrays, constants = split(batch)
        # Each batch is given all its calls and no other, so that it is compiled only once.
        shapes = compiled.eval_shape(model.variables, {}, arrays, constants)
        if not shapes:
            return {}
        given = {
            layer: tuple(
                _given(whole, like)
                for whole, like in zip_longest(known.get(layer, ())[: len(calls)], calls)
            )
            for layer, calls in shapes.items()
        }
        observed = compiled(model.variables, given, arrays, constants)
        return {layer: tuple(map(_statistics, calls)) for layer, calls in observed.items()}

    return observe


def _union(a: Network[Statistics], b: Network[Statistics]) -> Network[Statistics]:
    """Merge call by call. Each may have layers and calls that the other has not."""

    def of_layer(one: tuple[Statistics, ...], other: tuple[Statistics, ...]) -> Any:
        shared = tuple(map(merged, one, other))
        return shared + (one[len(shared) :] or other[len(shared) :])

    return {layer: of_layer(a.get(layer, ()), b.get(layer, ())) for layer in {**a, **b}}


def _equal(a: Network[Statistics], b: Network[Statistics]) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def _statistics(observed: Observed) -> Statistics:
    n, high, low, var = (np.asarray(value, np.float64) for value in observed[:4])
    return Statistics(n, high + low, var, np.asarray(observed.ddof))


def _given(whole: Statistics | None, like: Any) -> Observed:
    """Return what normalizes a call in the next pass, its mean as an unevaluated sum of two floats.

    A call that nothing is known of is given no values, and normalizes with its own.
    """
    dtype = like.var.dtype
    if whole is None:
        zeros = np.zeros(like.var.shape, dtype)
        return Observed(zeros, zeros, zeros, zeros, np.zeros(like.ddof.shape, like.ddof.dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        high = whole.mean.astype(dtype)
        low = (whole.mean - high).astype(dtype)
        return Observed(whole.n.astype(dtype), high, low, whole.var.astype(dtype), whole.ddof)


def _written(statistics: Tree, calls: Network[Statistics]) -> Tree:
    """Return the tree of statistics with those of the calls."""
    leaves, structure = jax.tree.flatten(statistics)
    layers = layers_of(statistics)
    wholes = {layer: reduce(merged, of_layer) for layer, of_layer in calls.items()}
    if not any(np.any(whole.n > 0) for whole in wholes.values()):
        raise ValueError(
            "batches hold no value that counts: they are empty, or masked out altogether."
        )
    for layer, whole in wholes.items():
        places = layers.get(layer, {})
        if not {"mean", "var"} <= places.keys():
            raise ValueError(f"variables have no 'mean' and 'var'{where(layer)}.")
        if np.max(whole.n, initial=0) == 1 and whole.ddof.flat[0] == 1:
            raise ValueError(
                f"batches hold one value per feature{where(layer)}, which has no unbiased "
                f"variance; give more values, or the layer running_variance='biased'."
            )
        mean, var = places["mean"], places["var"]
        leaves[mean], leaves[var] = new = to_state(whole, leaves[mean], leaves[var])
        kept = (whole.n <= whole.ddof.flat[0]).reshape(np.shape(new[0]))
        if not all(np.all(np.isfinite(leaf) | kept) for leaf in new):
            raise ValueError(
                f"batches give statistics that are not finite{where(layer)}: look for NaN, "
                f"infinity or values that overflow in them and in the weights."
            )
    return jax.tree.unflatten(structure, leaves)
