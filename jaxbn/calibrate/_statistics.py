"""Statistics of many values, merged in float64 on the host."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._complex import complex_like, is_complex
from jaxbn._trees import unboxed_path

LayerPath = tuple[Any, ...]


class Statistics(NamedTuple):
    """Count, mean and biased variance of values, in float64 and the shape of the layer's `mean`.

    The mean of complex values is in complex128.

    `ddof` is 1 if the layer tracks the unbiased variance, which divides by `n - 1`, and otherwise
    0. It is a scalar for each layer, so layers in a `scan` have an array of them.
    """

    n: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    ddof: np.ndarray


def merge_statistics(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of the values of both (Chan et al., 1979)."""
    n = a.n + b.n
    share = b.n / np.maximum(n, 1)
    with np.errstate(all="ignore"):
        difference = b.mean - a.mean
        mean = a.mean + share * difference
        var = (1 - share) * a.var + share * b.var + share * (1 - share) * np.abs(difference) ** 2
    # Statistics of no values may be anything, even NaN.
    mean = np.where(b.n == 0, a.mean, np.where(a.n == 0, b.mean, mean))
    var = np.where(b.n == 0, a.var, np.where(a.n == 0, b.var, var))
    return Statistics(n, mean, var, a.ddof)


def from_state(n: float, mean: ArrayLike, var: ArrayLike, ddof: int) -> Statistics:
    """Return the statistics of `n` values whose mean and variance are those of a state."""
    mean, var = in_64_bits(mean), in_64_bits(var)
    biased = var * (n - ddof) / n if n > ddof else np.zeros_like(var)
    return Statistics(np.full(mean.shape, n), mean, biased, np.asarray(ddof))


def to_state(
    statistics: Statistics, old_mean: ArrayLike, old_var: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Return mean and variance in the shapes and dtypes of the old ones.

    The old ones are kept in features with too few values.
    """
    n, ddof = statistics.n, statistics.ddof.flat[0]
    var = statistics.var * (n / np.maximum(n - ddof, 1))

    def new(old: ArrayLike, value: np.ndarray, exists: np.ndarray) -> jax.Array:
        shape, dtype = np.shape(old), jnp.asarray(old).dtype
        value = np.where(exists.reshape(shape), value.reshape(shape), in_64_bits(old))
        with np.errstate(over="ignore"):
            return jnp.asarray(value, complex_like(value.dtype, dtype))

    return new(old_mean, statistics.mean, n > 0), new(old_var, var, n > ddof)


def in_64_bits(value: ArrayLike) -> np.ndarray:
    """Return real numbers in float64, and complex ones in complex128."""
    return np.asarray(value, np.complex128 if is_complex(value) else np.float64)


def leaf_indices(tree: Any) -> dict[LayerPath, dict[Any, int]]:
    """Return, by layer and name, the index of each leaf among all leaves of the tree."""
    layers: dict[LayerPath, dict[Any, int]] = {}
    for index, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(tree)[0]):
        keys = tuple(map(_plain_key, unboxed_path(path))) or ("",)
        layers.setdefault(keys[:-1], {})[keys[-1]] = index
    return layers


def _plain_key(key: Any) -> Any:
    """Return a mapping's key, a sequence's index or an attribute's name."""
    return next(getattr(key, of) for of in ("key", "idx", "name") if hasattr(key, of))


def in_layer(layer: LayerPath) -> str:
    """Return the end of an error message that names the layer."""
    return f" in {'/'.join(map(str, layer))}" if layer else ""
