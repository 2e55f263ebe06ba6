"""The moments of several devices, from each one's."""

from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._readings import Moments, total

# Up to this many devices, each one gets the moments of all in one collective. Beyond, the bytes of
# that take longer than the latency of a second collective; docs/scaling.md has the model.
FEW_DEVICES = 256


def across_devices(
    own: Moments, axis_name: Hashable, axis_index_groups: Sequence[Sequence[int]] | None
) -> Moments:
    """Return the moments of the values of all devices, given those of each one's."""
    if lax.psum(1, axis_name, axis_index_groups=axis_index_groups) <= FEW_DEVICES:
        return merge(gather(own, axis_name, axis_index_groups))

    def over_devices(*values: jax.Array) -> jax.Array:
        row = jnp.stack(jnp.broadcast_arrays(*values))
        return lax.psum(row, axis_name, axis_index_groups=axis_index_groups)

    return merge_by_sums(own, over_devices)


def merge(parts: Moments) -> Moments:
    """Return the moments of all devices, given each one's on the first axis (Chan et al., 1979)."""
    n = total(parts.n, (0,))
    weight = parts.n / jnp.maximum(n, 1)
    mean_high, mean_low = jnp.zeros_like(n), jnp.zeros_like(n)
    deviation = parts.mean_low
    for _ in range(3):
        # About zero, about the mean but for rounding, and about the number nearest to the mean.
        mean_high = mean_high + mean_low
        deviation = (parts.mean_high - mean_high) + parts.mean_low
        mean_low = total(weight * deviation, (0,))
    between = deviation - mean_low
    # Weighted before it is squared, which would overflow where the mean of the squares does not.
    var = total(weight * parts.var + between * (weight * between), (0,))
    return Moments(*(value[0] for value in (n, mean_high, mean_low, var)))


def merge_by_sums(own: Moments, over_devices: Callable[..., jax.Array]) -> Moments:
    """Return the same by two sums over the devices, the second about the mean that is the first.

    Where the devices' means are equal, this one is theirs but for a rounding of it.
    """
    # Scaled by a power of two, a sum of up to 2^40 values overflows only if their mean does.
    unit = 2.0**-40
    n, scaled = over_devices(own.n, own.mean * (own.n * unit))
    weight = own.n / jnp.maximum(n, 1)
    mean_high = scaled / (jnp.maximum(n, 1) * unit)
    deviation = (own.mean_high - mean_high) + own.mean_low
    weighted = weight * deviation
    mean_low, square = over_devices(weighted, weight * own.var + deviation * weighted)
    return Moments(n, mean_high, mean_low, jnp.maximum(square - jnp.square(mean_low), 0))


def gather(
    own: Moments, axis_name: Hashable, axis_index_groups: Sequence[Sequence[int]] | None
) -> Moments:
    """Return every device's moments, stacked on a new first axis, in one collective."""
    row = jnp.stack(jnp.broadcast_arrays(*own))
    # Where `shard_map` checks, this makes the row vary over the devices, even if `x` does not; the
    # table is then known to be the same on all of them.
    row = row + 0 * lax.axis_index(axis_name).astype(row.dtype)
    names = axis_name if isinstance(axis_name, list | tuple) else (axis_name,)
    is_checked = set(names) <= jax.typeof(row).manual_axis_type.varying
    table = lax.all_gather(
        row,
        axis_name,
        axis_index_groups=axis_index_groups,
        to="invarying" if is_checked else "varying",
    )
    return Moments(*jnp.moveaxis(table, 1, 0))
