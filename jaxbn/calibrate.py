"""Exact running statistics of a whole data set, and of shards put together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, TypeVar

import jax
import numpy as np

from jaxbn import _checks
from jaxbn._pooling import Whole, layers_of, part, pooled, tracked, where
from jaxbn._running import Estimator
from jaxbn._watch import Model, Network, Seen, as_function

__all__ = ["merge", "recalibrate"]

Tree = TypeVar("Tree")


def recalibrate(model: Any, variables: Tree, batches: Iterable[Any], **apply_kwargs: Any) -> Tree:
    r"""The variables, with the running statistics that the whole data set has under their weights.

    Each batch norm's mean and variance become those that one training step over all batches at
    once, as one batch, would see in it: every layer is fed by the network whose earlier layers
    normalize with the statistics of the whole. So they do not depend on how the data is cut into
    batches, as long as nothing else in the network is random or looks across examples. With
    :math:`n_i` values, mean :math:`\mu_i` and biased variance :math:`\sigma_i^2` in batch
    :math:`i`, those of the whole are

    .. math::

        n = \sum_i n_i, \quad \mu = \frac{1}{n} \sum_i n_i \mu_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i n_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)

    which is not the mean of the variances. They are summed in float64. A layer whose
    `running_variance` is "unbiased" keeps :math:`\sigma^2 n / (n - 1)`.

    To be for weights that no training step has seen with their statistics: averaged (SWA, EMA),
    quantized or pruned ones, or trained ones on data of another domain.

    The data is passed over once for each batch norm that lies on one path through the network: a
    pass makes the next layer's statistics exact. It ends when a pass changes nothing, or after as
    many passes as batch norms are called, whichever is first.

    Layers are `jaxbn.linen.BatchNorm`, `jaxbn.nnx.BatchNorm`, Flax's own two, and what inherits
    from them. Where the call runs the model in training mode, a layer that is frozen in it
    normalizes with its running statistics and keeps them. Where it runs all of them in evaluation
    mode, all are calibrated, and what else depends on the mode, such as dropout, does what it does
    in evaluation. `axis_name` and `virtual_batch_size` are not looked at: the whole is one batch.
    A layer that is called several times normalizes
    each call with the statistics of that call, as in training, and keeps those of all together.

    Args:
      model: a `flax.linen.Module`; or an `flax.nnx.Module` or `flax.nnx.GraphDef`, which stays as
        it is.
      variables: those of a Linen model, or an `nnx.State`, such as `nnx.state(model)` or, where the
        model is a `Module`, only its `BatchStat`. They stay as they are.
      batches: what the model is called with, each an array; or a tuple of positional arguments,
        such as an input and its mask; or a dict of keyword arguments. It is passed over several
        times, for which the batches of an iterator are kept in a list.
      **apply_kwargs: what else `model.apply`, or the NNX model, is called with, such as
        `train=True` or `rngs`. `mutable` has no meaning here.

    Returns:
      Variables of the structure, shapes and dtypes that came. Only `mean` and `var` of batch norms
      differ: of features with a value that counts, and with two values for an unbiased variance.
      `count`, a number of training batches, stays as it is.

    Raises:
      TypeError: `model` or `variables` are of another kind.
      ValueError: there is no batch, or no batch norm; one value per feature, for which no unbiased
        variance exists; statistics that are not finite.

    Example:
      >>> import flax.linen as nn, jax, jaxbn.linen
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (1000, 4))
      >>> model = nn.Sequential([nn.Dense(8), jaxbn.linen.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(1), x)
      >>> variables = recalibrate(model, variables, [x[:300], x[300:]])
      >>> y = model.apply(variables, x)
      >>> print(f"{abs(y.mean()):.2f} {y.std():.2f}")
      0.00 1.00

    Source: the pooling is that of Chan, Golub and LeVeque, "Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances", 1979; one use is section 3.2 of Izmailov et al.,
    "Averaging Weights Leads to Wider Optima and Better Generalization", 2018.
    """
    if isinstance(batches, Iterator):
        batches = list(batches)
    watched = as_function(model, variables, apply_kwargs)
    given, everywhere = _first_given(watched, batches)
    see = jax.jit(partial(watched.see, everywhere=everywhere))

    whole: Network[Whole] = {}
    for _ in range(sum(seen.ddof.size for calls in given.values() for seen in calls)):
        parts = [_each(_values, see(watched.variables, given, batch)) for batch in batches]
        if not parts:
            raise ValueError(
                "batches were used up by the first pass over them: give a list, or an iterable "
                "that begins anew with each iter()."
            )
        whole = reduce(partial(_each, pooled), parts)
        before, given = given, _each(_given, whole, given)
        if jax.tree.all(jax.tree.map(np.array_equal, given, before)):
            break
    return watched.with_statistics(_written(watched.statistics, whole))


def merge(
    states: Sequence[Tree], counts: Sequence[Any], *, running_variance: Estimator = "unbiased"
) -> Tree:
    r"""The state of all data, from states that were each found on a part of it.

    With the number of values :math:`n_i`, the mean :math:`\mu_i` and the biased variance
    :math:`\sigma_i^2` of part :math:`i`, the mean and biased variance of the whole are

    .. math::

        n = \sum_i n_i, \quad \mu = \frac{1}{n} \sum_i n_i \mu_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i n_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)

    summed in float64. An unbiased variance is the biased one times :math:`n / (n - 1)`, before and
    after. What is exact for the parts is exact for the whole.

    Args:
      states: of one layer, a mapping with `mean`, `var` and, optionally, `count`; or a tree of
        such, as `variables["batch_stats"]` and `nnx.state(model, nnx.BatchStat)` are. All of the
        same structure and shapes.
      counts: for each state the number of values per feature that it was found on. In a tree the
        layers may differ, the shape of images for one: a tree of numbers then, that begins as the
        state does. A part of no values counts for nothing, NaN in its state included.
      running_variance: the estimator that the states hold, and the result.

    Returns:
      A state of the structure, shapes and dtypes of the first. Each `count` is the sum.

    Raises:
      ValueError: no state, or another number of counts; states of different structures or shapes;
        a count that is negative or no integer; no value at all, or a single one where the variance
        is unbiased.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0], [2.0], [4.0], [6.0], [8.0]])
      >>> states = [{"mean": part.mean(0), "var": part.var(0, ddof=1)} for part in (x[:3], x[3:])]
      >>> merge(states, [3, 2])
      {'mean': Array([4.], dtype=float32), 'var': Array([10.], dtype=float32)}
      >>> print(x.var(0, ddof=1))
      [10.]

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979.
    """
    _checks.estimator("running_variance", running_variance)
    if len(states) == 0 or len(counts) != len(states):
        raise ValueError(
            f"states and counts must be as many, and at least one, got {len(states)} states and "
            f"{len(counts)} counts."
        )
    structure = jax.tree.structure(states[0])
    for state in states[1:]:
        if jax.tree.structure(state) != structure:
            raise ValueError(
                f"states must have one structure, got {structure} and {jax.tree.structure(state)}."
            )
    parts = [jax.tree.leaves(state) for state in states]
    numbers = [
        jax.tree.leaves(jax.tree.broadcast(count, state))
        for count, state in zip(counts, states, strict=True)
    ]
    ddof = int(running_variance == "unbiased")

    merged = list(parts[0])
    for layer, places in layers_of(states[0]).items():
        if not {"mean", "var"} <= places.keys() <= {"mean", "var", "count"}:
            raise ValueError(
                f"states must have 'mean' and 'var' in each layer, and may have 'count', got "
                f"{sorted(map(str, places))}{where(layer)}."
            )
        for name, place in places.items():
            shapes = [np.shape(leaves[place]) for leaves in parts]
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"states must have the same shapes, got {', '.join(map(str, shapes))} for "
                    f"{name!r}{where(layer)}."
                )
        mean, var = places["mean"], places["var"]
        whole = reduce(
            pooled,
            (
                part(_number(number[mean]), leaves[mean], leaves[var], ddof)
                for number, leaves in zip(numbers, parts, strict=True)
            ),
        )
        if np.all(whole.n <= ddof):
            raise ValueError(
                f"counts must add up to {ddof + 1} at least, where the running variance is "
                f"{running_variance}, got {int(np.max(whole.n, initial=0))}{where(layer)}."
            )
        merged[mean], merged[var] = tracked(whole, parts[0][mean], parts[0][var])
        if "count" in places:
            merged[places["count"]] = sum(leaves[places["count"]] for leaves in parts)
    return jax.tree.unflatten(structure, merged)


def _first_given(model: Model, batches: Iterable[Any]) -> tuple[Network[Seen], bool]:
    """Statistics of no values for each call, and whether to watch layers in evaluation mode too."""
    first = next(iter(batches), None)
    if first is None:
        raise ValueError("batches must hold at least one batch, got none.")
    for everywhere in (False, True):
        see = partial(model.see, everywhere=everywhere)
        calls = jax.eval_shape(see, model.variables, {}, first)
        if calls:
            return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), calls), everywhere
    raise ValueError(
        "model must have a batch norm of jaxbn.linen, flax.linen, jaxbn.nnx or flax.nnx, and call "
        "it; got one that calls none."
    )


def _each(function: Callable[..., Any], *networks: Network[Any]) -> Network[Any]:
    """The function of each call."""
    first, *others = networks
    return {
        layer: tuple(map(function, calls, *(other[layer] for other in others)))
        for layer, calls in first.items()
    }


def _values(seen: Seen) -> Whole:
    n, shift, mean, var = (np.asarray(value, np.float64) for value in seen[:4])
    return Whole(n, shift + mean, var, np.asarray(seen.ddof))


def _given(whole: Whole, like: Seen) -> Seen:
    """What normalizes the next pass: the mean as a number, and what that number lacks."""
    dtype = like.mean.dtype
    with np.errstate(over="ignore", invalid="ignore"):
        shift = whole.mean.astype(dtype)
        rest = (whole.mean - shift).astype(dtype)
        return Seen(whole.n.astype(dtype), shift, rest, whole.var.astype(dtype), whole.ddof)


def _written(statistics: Tree, calls: Network[Whole]) -> Tree:
    """The tree of statistics with those of the calls."""
    leaves, structure = jax.tree.flatten(statistics)
    layers = layers_of(statistics)
    for layer, seen in calls.items():
        whole, places = reduce(pooled, seen), layers.get(layer, {})
        if not {"mean", "var"} <= places.keys():
            raise ValueError(f"variables have no 'mean' and 'var'{where(layer)}.")
        if np.max(whole.n, initial=0) == 1 and whole.ddof.flat[0] == 1:
            raise ValueError(
                f"batches hold one value per feature{where(layer)}, which has no unbiased "
                f"variance; give more values, or the layer running_variance='biased'."
            )
        mean, var = places["mean"], places["var"]
        leaves[mean], leaves[var] = new = tracked(whole, leaves[mean], leaves[var])
        kept = (whole.n <= whole.ddof.flat[0]).reshape(np.shape(new[0]))
        if not all(np.all(np.isfinite(leaf) | kept) for leaf in new):
            raise ValueError(
                f"batches give statistics that are not finite{where(layer)}: look for NaN, "
                f"infinity or values that overflow in them and in the weights."
            )
    return jax.tree.unflatten(structure, leaves)


def _number(count: Any) -> float:
    number = float(count)
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"counts must be integers, 0 at least, got {count!r}.")
    return number
