"""Count, mean and variance of a batch: accurate far from zero, under a mask, across devices."""

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxbn import _fusion

# The name of the moments for policies of `jax.checkpoint`.
NAME = "batch_norm_moments"
# The shift is the mean of one value in this many, or of a few more.
FRACTION = 16


def statistics_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Return float32 at least: half precision neither sums nor averages well."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


class Moments(NamedTuple):
    """The moments of a batch, each of a shape that broadcasts against it.

    The mean is stored as an unevaluated sum of two floats, so it stays accurate relative to the
    deviation even far from zero. The variance is the biased one.
    """

    n: jax.Array
    mean_high: jax.Array
    mean_low: jax.Array
    var: jax.Array

    @property
    def mean(self) -> jax.Array:
        return self.mean_high + self.mean_low


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def moments(
    x: jax.Array,
    mask: jax.Array | None,
    known_shift: jax.Array | None,
    narrow: DTypeLike,
    axes: tuple[int, ...],
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    r"""Return the moments of `x` over `axes`, where `mask` is true, and over mapped devices.

    With deviations :math:`d = x - s` from a shift :math:`s`,

    .. math::

        \mu = s + E[d], \quad \sigma^2 = E[d^2] - E[d]^2

    takes one reading of `x`, and is as accurate as the shift is close to the mean: the rounding
    error of the sums, relative to the variance, is multiplied by
    :math:`E[d^2] / \sigma^2 = 1 + (s - \mu)^2 / \sigma^2`.

    The shift is the mean of a sixteenth of the values. That is close enough for any values
    whatever: if a fraction 1 / f of them has the mean s and the others have the mean t, then the
    variance between these two parts alone, which the whole variance exceeds, is
    :math:`(s - \mu)^2 / (f - 1)`. So the factor is at most f.

    Args:
      x: the batch, in the dtype of the statistics.
      mask: booleans of the rank of `x`, or None.
      known_shift: None; or what may serve as the shift of an input in half precision, on platforms
        that gain by it. It must be the same on all devices.
      narrow: the dtype in which the values of `x` came.
      axes: the axes that are reduced.
      axis_name: the mapped axis or axes that share the statistics.
      axis_index_groups: the groups of its indices that do.

    The count and `mean_high` have no derivative. Those of the others are `E[dx]` and
    `2 E[(x - mean) dx]`, whatever the shift.
    """

    def in_one_reading(x: jax.Array) -> Moments:
        shift = _sample_mean(x, mask, axes) if known_shift is None else known_shift
        return _about(shift, x, mask, narrow, axes)

    def on_cpu(x: jax.Array) -> Moments:
        first = _mean_then_variance(x, mask, narrow, axes)
        return _fusion.until_accurate(
            first, partial(_about, x=x, mask=mask, narrow=narrow, axes=axes)
        )

    # On a CPU these come out of a loop, and are the same numbers wherever they are used. A compiler
    # may compute what it fuses twice, and round it otherwise, which this sum would not forgive.
    n, shift, mean, var = _fusion.by_platform(x, cpu=on_cpu, default=in_one_reading)
    mean_high = shift + mean
    batch = Moments(n, mean_high, (shift - mean_high) + mean, var)
    if axis_name is None:
        return batch
    return _merge(_gather(batch, axis_name, axis_index_groups))


@moments.defjvp
def _moments_jvp(narrow, axes, axis_name, axis_index_groups, primals, tangents):
    x, mask, _ = primals
    dx, *_ = tangents
    batch = moments(*primals, narrow, axes, axis_name, axis_index_groups)
    batch = checkpoint_name(batch, NAME)
    # E[(x - mean) dx], with what is constant within a feature taken out of the sum.
    deviation = x - batch.mean_high
    if mask is not None:
        deviation, dx = (jnp.where(mask, value, 0) for value in (deviation, dx))
    sums = jnp.stack([_sum(dx, axes), _sum(deviation * dx, axes)])
    if axis_name is not None:
        sums = lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)
    dmean, product = (total / jnp.maximum(batch.n, 1) for total in sums)
    dvar = 2 * (product - batch.mean_low * dmean)
    return batch, Moments(jnp.zeros_like(batch.n), jnp.zeros_like(batch.mean_high), dmean, dvar)


def _sample_mean(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Return the mean of a sixteenth of the values of each feature, or zero where it is near zero.

    Under a mask, where that part may hold no value that counts, it is the mean of all.
    """
    part = x if mask is not None else _sample(x, axes)
    n = _count(part, mask, axes)
    mean = _mean(part, n, axes, mask)
    # Once more about that mean, which takes out its rounding error: far from zero that may exceed
    # the deviation, and a constant feature gets its very value.
    deviation = part - mean
    mean = mean + _mean(deviation, n, axes, mask)
    var = _mean(jnp.square(deviation), n, axes, mask)
    # About zero, a mean that is small beside the deviation is accurate beside itself, too. With
    # var <= f sigma², the factor of the error is then (sqrt(f - 1) + sqrt(f) / 4)² at most. (Of
    # equal values near the largest number, the square of the rounding error overflows.)
    is_near_zero = (jnp.abs(mean) * 4 <= jnp.sqrt(var)) & (var < jnp.inf)
    return jnp.where(is_near_zero, 0, mean)


def _sample(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Return a sixteenth of `x`: some consecutive indices in the middle of a reduced axis.

    It is the longest axis but the first, along which batches are split over devices. Where there is
    no other, every sixteenth index of the first is taken, so that each device has its share. An
    axis that is explicitly sharded cannot be sliced.
    """
    spec = jax.typeof(x).sharding.spec
    whole = [a for a in axes if a >= len(spec) or spec[a] is None]
    inner = [a for a in whole if a != axes[0] and isinstance(x.shape[a], int) and x.shape[a] > 1]
    if inner:
        axis = max(inner, key=lambda a: x.shape[a])
        size = -(-x.shape[axis] // FRACTION)
        start = (x.shape[axis] - size) // 2
        return lax.slice_in_dim(x, start, start + size, axis=axis)
    if axes[:1] == tuple(whole[:1]) and axes:
        return lax.slice_in_dim(x, 0, x.shape[axes[0]], FRACTION, axis=axes[0])
    return x


def _about(
    shift: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
    narrow: DTypeLike,
    axes: tuple[int, ...],
) -> Moments:
    """Return the moments on one device, by sums of deviations from a shift and of their squares.

    The mean is the shift, as `mean_high`, and what is to be added to it.
    """
    n = _count(x, mask, axes)
    own_x, own_shift = _fusion.apart(narrow, x, shift)
    mean = _mean(own_x - own_shift, n, axes, mask)
    own_x, own_shift, _ = _fusion.apart(narrow, x, shift, mean)
    var = _mean(jnp.square(own_x - own_shift), n, axes, mask) - jnp.square(mean)
    return Moments(n, shift, mean, jnp.maximum(var, 0))


def _mean_then_variance(
    x: jax.Array, mask: jax.Array | None, narrow: DTypeLike, axes: tuple[int, ...]
) -> Moments:
    """Return the moments on one device, the variance about the mean, in a reading each."""
    n = _count(x, mask, axes)
    divisor = jnp.maximum(n, 1)
    own_x, _ = _fusion.apart(narrow, x, n)
    mean = _sum(own_x, axes, mask) / divisor
    own_x, own_mean = _fusion.apart(narrow, x, mean)
    var = _sum(jnp.square(own_x - own_mean), axes, mask) / divisor
    return Moments(n, mean, jnp.zeros_like(mean), var)


def _merge(parts: Moments) -> Moments:
    """Return the moments of all devices, given each one's on the first axis (Chan et al., 1979)."""
    n = _sum(parts.n, (0,))
    weight = parts.n / jnp.maximum(n, 1)
    mean_high, mean_low = jnp.zeros_like(n), jnp.zeros_like(n)
    deviation = parts.mean_low
    for _ in range(3):
        # About zero, about the mean but for rounding, and about the number nearest to the mean.
        mean_high = mean_high + mean_low
        deviation = (parts.mean_high - mean_high) + parts.mean_low
        mean_low = _sum(weight * deviation, (0,))
    between = deviation - mean_low
    # Weighted before it is squared, which would overflow where the mean of the squares does not.
    var = _sum(weight * parts.var + between * (weight * between), (0,))
    return Moments(*(value[0] for value in (n, mean_high, mean_low, var)))


def _gather(
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


def _count(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Return the number of values that count."""
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(x.shape[a] for a in axes), x.dtype)
    copies = math.prod(x.shape[a] for a in axes if mask.shape[a] != x.shape[a])
    return _sum(mask.astype(x.dtype), axes) * jnp.asarray(copies, x.dtype)


def _mean(x: jax.Array, n: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
    """Return the mean of `n` values, zero of none."""
    # A power of two scales without rounding; so scaled, a sum overflows only if its mean does.
    n = jnp.maximum(n, 1)
    unit = lax.reduce_precision(1 / n, jnp.finfo(n.dtype).nexp, 0)
    return _sum(x * unit, axes, mask) / (n * unit)


def _sum(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None) -> jax.Array:
    return jnp.sum(x, axes, where=mask, keepdims=True)
