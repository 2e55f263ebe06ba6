"""A shift that is close to the mean for any batch: the mean of a sample of its values."""

import jax
from jax import lax

from jaxbn._readings import average, count, unsharded

# The sample contains one in this many of the values, or slightly more.
FRACTION = 16


def sample_mean(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Return the mean of at least a sixteenth of the values of each feature.

    Under a mask it is the mean of all values that count, as the sample may hold none of them.
    """
    part = x if mask is not None else _sample(x, axes)
    n = count(part, mask, axes)
    mean = average(part, n, axes, mask)
    # Average again, about that mean, to remove its rounding error, which may exceed the deviation
    # far from zero. A constant feature then gets exactly its value.
    return mean + average(part - mean, n, axes, mask)


def _sample(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return at least a sixteenth of `x`: some consecutive indices in the middle of a reduced axis.

    The axis is the longest one except the first, along which batches are split over devices. If
    there is no other, every sixteenth index of the first is taken, so that each device has its
    share. An axis that is explicitly sharded cannot be sliced.
    """
    sliceable = [a for a in unsharded(x) if a in axes]
    inner = [a for a in sliceable if a != axes[0] and isinstance(x.shape[a], int)]
    axis = max(inner, key=lambda a: x.shape[a], default=None)
    if axis is not None and x.shape[axis] > 1:
        size = -(-x.shape[axis] // FRACTION)
        start = (x.shape[axis] - size) // 2
        return lax.slice_in_dim(x, start, start + size, axis=axis)
    if axes and axes[0] in sliceable:
        return lax.slice_in_dim(x, 0, x.shape[axes[0]], FRACTION, axis=axes[0])
    return x
