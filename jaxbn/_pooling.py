"""Merge the statistics of several batches or shards, in float64 on the host."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey
from jax.typing import ArrayLike

# The path of a layer's statistics.
Layer = tuple[Any, ...]


class Statistics(NamedTuple):
    """Count, mean and biased variance of values, float64, each of the shape of the layer's `mean`.

    `ddof` is that of `Observed`.
    """

    n: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    ddof: np.ndarray


def merged(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of the values of both (Chan et al., 1979)."""
    n = a.n + b.n
    share = b.n / np.maximum(n, 1)
    with np.errstate(all="ignore"):
        difference = b.mean - a.mean
        mean = a.mean + share * difference
        var = (1 - share) * a.var + share * b.var + share * (1 - share) * difference**2
    # Statistics of no values may be anything, NaN too.
    mean = np.where(b.n == 0, a.mean, np.where(a.n == 0, b.mean, mean))
    var = np.where(b.n == 0, a.var, np.where(a.n == 0, b.var, var))
    return Statistics(n, mean, var, a.ddof)


def from_state(n: float, mean: ArrayLike, var: ArrayLike, ddof: int) -> Statistics:
    """Return the statistics of `n` values that left the state `mean` and `var`."""
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    biased = var * (n - ddof) / n if n > ddof else np.zeros_like(var)
    return Statistics(np.full(mean.shape, n), mean, biased, np.asarray(ddof))


def to_state(
    statistics: Statistics, mean: jax.Array, var: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return mean and variance in the form of the old ones, which stay where no value counts."""
    n, ddof = statistics.n, statistics.ddof.flat[0]
    new_var = statistics.var * (n / np.maximum(n - ddof, 1))

    def new(old: jax.Array, value: np.ndarray, exists: np.ndarray) -> jax.Array:
        old_value, shape = np.asarray(old, np.float64), np.shape(old)
        value = np.where(exists.reshape(shape), value.reshape(shape), old_value)
        with np.errstate(over="ignore"):
            return jnp.asarray(value, jnp.asarray(old).dtype)

    return new(mean, statistics.mean, n > 0), new(var, new_var, n > ddof)


def layers_of(tree: Any) -> dict[Layer, dict[Any, int]]:
    """Return for each layer where its statistics are among the tree's leaves."""
    layers: dict[Layer, dict[Any, int]] = {}
    for place, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        # Boxes, such as NNX's variables, hold their array as `value`.
        path = path[:-1] if path and path[-1] == GetAttrKey("value") else path
        layer, name = tuple(map(_name, path[:-1])), _name(path[-1]) if path else ""
        layers.setdefault(layer, {})[name] = place
    return layers


def _name(key: Any) -> Any:
    """Return a mapping's key, a sequence's index or an attribute's name."""
    return next(getattr(key, of) for of in ("key", "idx", "name") if hasattr(key, of))


def where(layer: Layer) -> str:
    """Return the words that name the layer at the end of a message."""
    return f" in {'/'.join(map(str, layer))}" if layer else ""
