"""Merge the states that shards of the data left."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._pooling import Layer, from_state, layers_of, merged, to_state, where
from jaxbn._running import Estimator

Tree = TypeVar("Tree")


def merge(
    states: Sequence[Tree], counts: Sequence[Any], *, running_variance: Estimator = "unbiased"
) -> Tree:
    r"""Merge the states that parts of the data left into the state of all of it.

    With the number of values :math:`n_i`, the mean :math:`\mu_i` and the biased variance
    :math:`\sigma_i^2` of part :math:`i`, the mean and biased variance of the whole are

    .. math::

        n = \sum_i n_i, \quad \mu = \frac{1}{n} \sum_i n_i \mu_i, \quad
        \sigma^2 = \frac{1}{n} \sum_i n_i \left(\sigma_i^2 + (\mu_i - \mu)^2\right)

    summed in float64. An unbiased variance is the biased one times :math:`n / (n - 1)`, in the
    states and in the result. Where the states are exact for the parts, the result is exact for the
    whole.

    Args:
      states: a list of the states of one layer, mappings with `mean`, `var` and, optionally,
        `count`; or of trees of such, like `variables["batch_stats"]` and
        `nnx.state(model, nnx.BatchStat)`. All have the same structure and shapes.
      counts: for each state, the number of values per feature that it was computed from. Where the
        layers of a tree differ in it, because their images differ in size for one, a tree of
        numbers that is a prefix of the state. A part of no values counts for nothing, and its state
        may hold NaN.
      running_variance: the estimator of the variances in the states, and in the result. **The
        default, "unbiased", is right for states that `batch_norm` tracks by default. The layers
        track the biased variance by default, so for their states pass "biased".**

    Returns:
      A state of the structure, shapes and dtypes of the first. Each `count` is the sum.

    Raises:
      TypeError: `states` or `counts` is not a list.
      ValueError: there is no state, or another number of counts; states differ in structure or
        shapes, or hold NaN or infinity; a count is negative or not an integer; the counts of a
        layer add up to 0, or to 1 where the variance is unbiased; the sum of `count` is more than
        its dtype holds.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0], [2.0], [4.0], [6.0], [8.0]])
      >>> states = [{"mean": part.mean(0), "var": part.var(0, ddof=1)} for part in (x[:3], x[3:])]
      >>> merge(states, [3, 2])
      {'mean': Array([4.], dtype=float32), 'var': Array([10.], dtype=float32)}
      >>> print(x.var(0, ddof=1))
      [10.]

      The layers track the biased variance:

      >>> states = [{"mean": part.mean(0), "var": part.var(0)} for part in (x[:3], x[3:])]
      >>> merge(states, [3, 2], running_variance="biased")
      {'mean': Array([4.], dtype=float32), 'var': Array([8.], dtype=float32)}

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979.
    """
    _checks.estimator("running_variance", running_variance)
    states, counts = _as_list("states", states), _as_list("counts", counts)
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
    layers = layers_of(states[0])
    if not layers:
        raise ValueError(f"states must have 'mean' and 'var' of a layer at least, got {states[0]}.")
    parts = [jax.tree.leaves(state) for state in states]
    numbers = [_for_each_leaf(i, counts[i], state) for i, state in enumerate(states)]

    result = list(parts[0])
    for layer, places in layers.items():
        if not {"mean", "var"} <= places.keys() <= {"mean", "var", "count"}:
            raise ValueError(
                f"states must have 'mean' and 'var' in each layer, and may have 'count', got "
                f"{sorted(map(str, places))}{where(layer)}."
            )
        by_name = {name: [leaves[place] for leaves in parts] for name, place in places.items()}
        values = [_number(number[places["mean"]]) for number in numbers]
        for name, leaf in _merged_layer(layer, by_name, values, running_variance).items():
            result[places[name]] = leaf
    return jax.tree.unflatten(structure, result)


def _merged_layer(
    layer: Layer, states: Mapping[str, list[Any]], counts: list[float], estimator: Estimator
) -> dict[str, jax.Array]:
    """Merge the `mean`, `var` and `count` that one layer has in each state."""
    ddof = int(estimator == "unbiased")
    _check_shapes(layer, states)
    _check_finite(layer, "mean", states["mean"], counts, at_least=1)
    _check_finite(layer, "var", states["var"], counts, at_least=1 + ddof)
    if sum(counts) <= ddof:
        raise ValueError(
            f"counts must add up to {ddof + 1} at least, where the running variance is "
            f"{estimator}, got {int(sum(counts))}{where(layer)}."
        )
    parts = map(from_state, counts, states["mean"], states["var"], [ddof] * len(counts))
    mean, var = to_state(reduce(merged, parts), states["mean"][0], states["var"][0])
    if "count" not in states:
        return {"mean": mean, "var": var}
    return {"mean": mean, "var": var, "count": _sum(layer, states["count"])}


def _as_list(name: str, value: Any) -> list[Any]:
    """Return the elements of any iterable but a mapping, whose elements are its keys."""
    if not isinstance(value, Mapping | str):
        try:
            return list(value)
        except TypeError:
            pass
    one = "state" if name == "states" else "number, or a tree of numbers,"
    raise TypeError(
        f"{name} must be a list with one {one} for each part of the data, got "
        f"{type(value).__name__}."
    )


def _for_each_leaf(place: int, count: Any, state: Any) -> list[Any]:
    try:
        return jax.tree.leaves(jax.tree.broadcast(count, state))
    except ValueError:
        raise ValueError(
            f"counts[{place}] must be a number, or a tree of numbers that is a prefix of the "
            f"state, got {count!r} for a state of structure {jax.tree.structure(state)}."
        ) from None


def _number(count: Any) -> float:
    try:
        number = float(count)
    except (TypeError, ValueError):
        number = -1.0
    if not (number >= 0 and number.is_integer()):
        raise ValueError(f"counts must be integers, 0 at least, got {count!r}.")
    return number


def _check_shapes(layer: Layer, states: Mapping[str, list[Any]]) -> None:
    for name, leaves in states.items():
        shapes = [np.shape(leaf) for leaf in leaves]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"states must have the same shapes, got {', '.join(map(str, shapes))} for "
                f"{name!r}{where(layer)}."
            )
    mean, var = np.shape(states["mean"][0]), np.shape(states["var"][0])
    if mean != var:
        raise ValueError(
            f"states must have 'mean' and 'var' of the same shape, got {mean} and {var}"
            f"{where(layer)}."
        )


def _check_finite(
    layer: Layer, name: str, leaves: list[Any], counts: list[float], at_least: int
) -> None:
    for i, (leaf, count) in enumerate(zip(leaves, counts, strict=True)):
        if count >= at_least and not np.all(np.isfinite(np.asarray(leaf, np.float64))):
            raise ValueError(
                f"states[{i}] must be finite, as counts[{i}] is {count:.0f}, got NaN or infinity "
                f"in {name!r}{where(layer)}; a part of no values has the count 0."
            )


def _sum(layer: Layer, counts: list[Any]) -> jax.Array:
    """Add up the numbers of training batches, exactly, in the dtype of the first."""
    dtype = jax.dtypes.canonicalize_dtype(np.asarray(counts[0]).dtype)
    # Python's integers do not overflow.
    total = np.asarray(sum(np.asarray(count).astype(object) for count in counts))
    largest = np.max(total, initial=0)
    if jnp.issubdtype(dtype, jnp.integer) and largest > jnp.iinfo(dtype).max:
        raise ValueError(
            f"states must have a 'count' that adds up to at most {jnp.iinfo(dtype).max}, the "
            f"largest {dtype}, got {largest}{where(layer)}; leave 'count' out, or make it smaller."
        )
    return jnp.asarray(total.astype(dtype))
