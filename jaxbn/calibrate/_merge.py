"""Merge the states of shards of the data."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._running import Estimator
from jaxbn.calibrate._statistics import (
    LayerPath,
    from_state,
    in_64_bits,
    in_layer,
    leaf_indices,
    merge_statistics,
    to_state,
)

Tree = TypeVar("Tree")


def merge(
    states: Sequence[Tree], counts: Sequence[Any], *, running_variance: Estimator = "unbiased"
) -> Tree:
    r"""Merge the states of shards of the data into the state of all the data.

    With the number of values :math:`n_i`, the mean :math:`\mu_i` and the biased variance
    :math:`\sigma_i^2` of shard :math:`i`, the mean and biased variance of all data are

    .. math::

        n = \sum_i n_i, \quad \mu = \frac{1}{n} \sum_i n_i \mu_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i n_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)

    summed in float64. An unbiased variance is the biased one times :math:`n / (n - 1)`, in the
    states and in the result. If the states are exact for the shards, the result is exact for all
    data.

    Args:
      states: a list with a state for each shard. A state is that of one layer, a mapping with
        `mean`, `var` and, optionally, `count`; or a tree of them, such as
        `variables["batch_stats"]` or `nnx.state(model, nnx.BatchStat)`. All have the same structure
        and shapes.
      counts: for each state, the number of values per feature that it was computed from. If this
        differs between the layers of a tree, for example because their images differ in size, pass
        a tree of numbers that is a prefix of the state. A shard without values has no effect, and
        its state may hold NaN.
      running_variance: the estimator of the variances in the states, and in the result. **The
        default, "unbiased", is right for states that `batch_norm` tracks by default. The layers
        track the biased variance by default, so for their states pass "biased".**

    Returns:
      A state with the structure, shapes and dtypes of the first one. Each `count` is the sum.

    Raises:
      TypeError: `states` or `counts` is not a list.
      ValueError: `states` is empty, or its length differs from that of `counts`; states differ in
        structure or shapes, or hold NaN or infinity; a count is negative or not an integer; the
        counts of a layer add up to 0, or to 1 where the variance is unbiased; the sum of `count`
        exceeds its dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxbn.calibrate import merge
      >>> x = jnp.array([[0.0], [2.0], [4.0], [6.0], [8.0]])
      >>> shards = x[:3], x[3:]
      >>> states = [{"mean": shard.mean(0), "var": shard.var(0, ddof=1)} for shard in shards]
      >>> merge(states, [3, 2])
      {'mean': Array([4.], dtype=float32), 'var': Array([10.], dtype=float32)}
      >>> print(x.var(0, ddof=1))
      [10.]

      The layers track the biased variance:

      >>> states = [{"mean": shard.mean(0), "var": shard.var(0)} for shard in shards]
      >>> merge(states, [3, 2], running_variance="biased")
      {'mean': Array([4.], dtype=float32), 'var': Array([8.], dtype=float32)}

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979.
    """
    _checks.estimator("running_variance", running_variance)
    states, counts = _as_list("states", states), _as_list("counts", counts)
    if len(states) == 0 or len(counts) != len(states):
        raise ValueError(
            f"states and counts must have the same length, at least 1, got {len(states)} states "
            f"and {len(counts)} counts."
        )
    structure = jax.tree.structure(states[0])
    for state in states[1:]:
        if jax.tree.structure(state) != structure:
            raise ValueError(
                f"states must have the same structure, got {structure} and "
                f"{jax.tree.structure(state)}."
            )
    layers = leaf_indices(states[0])
    if not layers:
        raise ValueError(
            f"states must have 'mean' and 'var' of at least one layer, got {states[0]}."
        )
    leaves = [jax.tree.leaves(state) for state in states]
    leaf_counts = [_count_of_each_leaf(i, counts[i], state) for i, state in enumerate(states)]

    result = list(leaves[0])
    for layer, indices in layers.items():
        if not {"mean", "var"} <= indices.keys() <= {"mean", "var", "count"}:
            raise ValueError(
                f"states must have 'mean' and 'var' in each layer, and may have 'count', got "
                f"{sorted(map(str, indices))}{in_layer(layer)}."
            )
        by_name = {name: [shard[index] for shard in leaves] for name, index in indices.items()}
        layer_counts = [_number(shard[indices["mean"]]) for shard in leaf_counts]
        for name, leaf in _merge_layer(layer, by_name, layer_counts, running_variance).items():
            result[indices[name]] = leaf
    return jax.tree.unflatten(structure, result)


def _merge_layer(
    layer: LayerPath, states: Mapping[str, list[Any]], counts: list[float], estimator: Estimator
) -> dict[str, jax.Array]:
    """Merge the lists of `mean`, `var` and `count` that one layer has in the states."""
    ddof = int(estimator == "unbiased")
    _check_shapes(layer, states)
    _check_finite(layer, "mean", states["mean"], counts, at_least=1)
    _check_finite(layer, "var", states["var"], counts, at_least=1 + ddof)
    if sum(counts) <= ddof:
        raise ValueError(
            f"counts must add up to at least {ddof + 1} for {estimator} variances, got "
            f"{int(sum(counts))}{in_layer(layer)}."
        )
    shards = map(from_state, counts, states["mean"], states["var"], [ddof] * len(counts))
    mean, var = to_state(reduce(merge_statistics, shards), states["mean"][0], states["var"][0])
    if "count" not in states:
        return {"mean": mean, "var": var}
    return {"mean": mean, "var": var, "count": _sum(layer, states["count"])}


def _as_list(name: str, value: Any) -> list[Any]:
    """Return the elements of any iterable but a mapping or string."""
    if not isinstance(value, Mapping | str):
        try:
            return list(value)
        except TypeError:
            pass
    one = "state" if name == "states" else "number, or a tree of numbers,"
    raise TypeError(
        f"{name} must be a list with one {one} for each shard of the data, got "
        f"{type(value).__name__}."
    )


def _count_of_each_leaf(shard: int, count: Any, state: Any) -> list[Any]:
    try:
        return jax.tree.leaves(jax.tree.broadcast(count, state))
    except ValueError:
        raise ValueError(
            f"counts[{shard}] must be a number, or a tree of numbers that is a prefix of the "
            f"state, got {count!r} for a state of structure {jax.tree.structure(state)}."
        ) from None


def _number(count: Any) -> float:
    try:
        number = float(count)
    except (TypeError, ValueError):
        number = -1.0
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"counts must be integers of at least 0, got {count!r}.")
    return number


def _check_shapes(layer: LayerPath, states: Mapping[str, list[Any]]) -> None:
    for name, leaves in states.items():
        shapes = [np.shape(leaf) for leaf in leaves]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"states must have the same shapes, got {', '.join(map(str, shapes))} for "
                f"{name!r}{in_layer(layer)}."
            )
    mean, var = np.shape(states["mean"][0]), np.shape(states["var"][0])
    if mean != var:
        raise ValueError(
            f"states must have 'mean' and 'var' of the same shape, got {mean} and {var}"
            f"{in_layer(layer)}."
        )


def _check_finite(
    layer: LayerPath, name: str, leaves: list[Any], counts: list[float], at_least: int
) -> None:
    for i, (leaf, count) in enumerate(zip(leaves, counts, strict=True)):
        if count >= at_least and not np.all(np.isfinite(in_64_bits(leaf))):
            raise ValueError(
                f"states[{i}] must be finite, as counts[{i}] is {count:.0f}, got NaN or infinity "
                f"in {name!r}{in_layer(layer)}; the count of a shard without values is 0."
            )


def _sum(layer: LayerPath, counts: list[Any]) -> jax.Array:
    """Return the exact sum of the numbers of training batches, in the dtype of the first."""
    dtype = jax.dtypes.canonicalize_dtype(np.asarray(counts[0]).dtype)
    # Python's integers do not overflow.
    total = np.asarray(sum(np.asarray(count).astype(object) for count in counts))
    largest = np.max(total, initial=0)
    if jnp.issubdtype(dtype, jnp.integer) and largest > jnp.iinfo(dtype).max:
        raise ValueError(
            f"states must have a 'count' that adds up to at most {jnp.iinfo(dtype).max}, the "
            f"largest {dtype}, got {largest}{in_layer(layer)}; leave 'count' out, or reduce it."
        )
    return jnp.asarray(total.astype(dtype))
