"""The moments of a batch that is spread over devices, merged from those of each device."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxbn._checks import names_of
from jaxbn._half_precision import exact_if_constant, is_half
from jaxbn._readings import Moments, shifted_moments, total


def across_devices(
    own: Moments,
    input_dtype: DTypeLike,
    axis_name: Hashable | Sequence[Hashable],
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> Moments:
    """Return the moments of the values on all devices, given those of the values on this one."""
    names = tuple(names_of(axis_name))
    if is_half(input_dtype):
        sum_over_devices = partial(lax.psum, axis_name=names, axis_index_groups=axis_index_groups)
        return merge_about_zero(own, input_dtype, sum_over_devices)
    return merge(gather(own, names, axis_index_groups))


def merge(parts: Moments) -> Moments:
    """Merge the moments of all devices, stacked on the first axis (Chan et al., 1979)."""
    n = total(parts.n, (0,))
    weight = parts.n / jnp.maximum(n, 1)
    mean_high, mean_low = jnp.zeros_like(n), jnp.zeros_like(n)
    deviation = parts.mean_low
    for _ in range(3):
        # First about zero, then about the rounded mean, then about the float nearest to the mean.
        mean_high = mean_high + mean_low
        deviation = (parts.mean_high - mean_high) + parts.mean_low
        mean_low = total(weight * deviation, (0,))
    between = deviation - mean_low
    # Weight before squaring: the square may overflow where the mean of the squares does not.
    var = total(weight * parts.var + between * (weight * between), (0,))
    return Moments(*(value[0] for value in (n, mean_high, mean_low, var)))


def merge_about_zero(
    own: Moments, input_dtype: DTypeLike, sum_over_devices: Callable[[jax.Array], jax.Array]
) -> Moments:
    """Merge the moments of all devices with one sum, which is enough for half precision."""
    # Counted in units of 2^20 values, so that the sums do not overflow for values up to 1e16.
    share = own.n * 2.0**-20
    row = own.n, share * own.mean, share * (own.var + jnp.square(own.mean))
    n, mean, square = sum_over_devices(jnp.stack(jnp.broadcast_arrays(*row)))
    size = jnp.maximum(n, 1) * 2.0**-20
    batch = shifted_moments(n, jnp.zeros_like(n), mean / size, square / size)
    n, mean, zero, var = exact_if_constant(batch, input_dtype)
    return Moments(n, mean, zero, var)


def gather(
    own: Moments, names: tuple[Hashable, ...], axis_index_groups: Sequence[Sequence[int]] | None
) -> Moments:
    """Return the moments of every device, stacked on a new first axis.

    This takes one collective for all axes of `pmap` or `shard_map`, and one for each of `vmap`.
    """
    row = jnp.stack(jnp.broadcast_arrays(*own))
    # For `shard_map` with its check, this makes the row vary over the devices even if `x` does not,
    # so that the table is known to be the same on all of them.
    row = row + 0 * lax.axis_index(names).astype(row.dtype)
    varying = jax.typeof(row).manual_axis_type.varying
    manual = tuple(name for name in names if name in jax.sharding.get_abstract_mesh().manual_axes)
    table = row[None]
    for some in [manual, *((name,) for name in names if name not in manual)]:
        if some:
            table = lax.all_gather(
                table,
                some,
                axis_index_groups=axis_index_groups,
                tiled=True,
                to="invarying" if set(some) <= varying else "varying",
            )
    return Moments(*jnp.moveaxis(table, 1, 0))
