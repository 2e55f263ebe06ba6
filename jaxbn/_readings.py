"""The moments of a batch on one device: in one reading of it or, on a CPU, in two."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxbn import _fusion

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


@partial(jax.jit, static_argnums=(3, 4))
def of_one_device(
    x: jax.Array,
    mask: jax.Array | None,
    known_shift: jax.Array | None,
    narrow: DTypeLike,
    axes: tuple[int, ...],
) -> Moments:
    """Return the moments of the batch on this device; see `jaxbn._moments.moments`."""

    def in_one_reading(x: jax.Array) -> Moments:
        shift = _sample_mean(x, mask, axes) if known_shift is None else known_shift
        return _about(shift, x, mask, narrow, axes)

    def in_two_readings(x: jax.Array) -> Moments:
        # On a CPU each sum reads the batch by itself in any case.
        first = _mean_then_variance(x, mask, narrow, axes)
        return _until_accurate(first, partial(_about, x=x, mask=mask, narrow=narrow, axes=axes))

    # On a CPU these come out of a loop, and are the same numbers wherever they are used. A compiler
    # may compute what it fuses twice, and round it otherwise, which this sum would not forgive.
    n, shift, mean, var = _fusion.by_platform(x, default=in_one_reading, cpu=in_two_readings)
    mean_high = shift + mean
    return Moments(n, mean_high, (shift - mean_high) + mean, var)


def _sample_mean(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Return the mean of a sixteenth of the values of each feature, or zero where it is near zero.

    Under a mask, where that part may hold no value that counts, it is the mean of all.
    """
    part = x if mask is not None else _sample(x, axes)
    n = count(part, mask, axes)
    mean = _mean(part, n, axes, mask)
    # Once more about that mean, which takes out its rounding error: far from zero that may exceed
    # the deviation, and a constant feature gets its very value.
    deviation = part - mean
    mean = mean + _mean(deviation, n, axes, mask)
    var = _mean(jnp.square(deviation), n, axes, mask)
    # About zero, a mean that is small beside the deviation is accurate beside itself, too. With
    # var <= f sigma², the factor of the error is then (sqrt(f - 1) + sqrt(f) / 4)² at most.
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
    n = count(x, mask, axes)
    own_x, own_shift = _fusion.apart(narrow, x, shift)
    mean = _mean(own_x - own_shift, n, axes, mask)
    own_x, own_shift, _ = _fusion.apart(narrow, x, shift, mean)
    var = _mean(jnp.square(own_x - own_shift), n, axes, mask) - jnp.square(mean)
    return Moments(n, shift + jnp.zeros_like(mean), mean, jnp.maximum(var, 0))


def _mean_then_variance(
    x: jax.Array, mask: jax.Array | None, narrow: DTypeLike, axes: tuple[int, ...]
) -> Moments:
    """Return the moments on one device, the variance about the mean, in a reading each."""
    n = count(x, mask, axes)
    divisor = jnp.maximum(n, 1)
    own_x, _ = _fusion.apart(narrow, x, n)
    mean = total(own_x, axes, mask) / divisor
    own_x, own_mean = _fusion.apart(narrow, x, mean)
    var = total(jnp.square(own_x - own_mean), axes, mask) / divisor
    return Moments(n, mean, jnp.zeros_like(mean), var)


def _until_accurate(first: Moments, about: Callable[[jax.Array], Moments]) -> Moments:
    """Return the moments `first` or, of features where they are inaccurate, those about their mean.

    On a CPU a loop that does not run costs nothing.
    A mean about zero has an error of r roundings, relative to the deviation, where it is r
    deviations from zero: up to six are accepted. A variance about a shift is accepted as in
    `moments`. A third pass is about the number nearest to the mean: of equal values, their value.
    """

    def is_far(distance, var, deviations):
        return ~((jnp.abs(distance) <= deviations * jnp.sqrt(var)) & (var < jnp.inf))

    def needs_another(passes_far_batch):
        passes, far, _ = passes_far_batch
        return (passes < 3) & jnp.any(far)

    def another(passes_far_batch):
        passes, far, batch = passes_far_batch
        new = about(batch.mean)
        still_far = far & is_far(new.mean_low, new.var, 4)
        # The count is the same, and may have the shape of a single number.
        mended = {
            name: jnp.where(far, getattr(new, name), getattr(batch, name))
            for name in ("mean_high", "mean_low", "var")
        }
        return passes + 1, still_far, batch._replace(**mended)

    far = is_far(first.mean_high, first.var, 6)
    _, _, batch = lax.while_loop(needs_another, another, (jnp.ones((), jnp.int32), far, first))
    return batch


def count(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Return the number of values that count."""
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(x.shape[a] for a in axes), x.dtype)
    copies = math.prod(x.shape[a] for a in axes if mask.shape[a] != x.shape[a])
    return total(mask.astype(x.dtype), axes) * jnp.asarray(copies, x.dtype)


def _mean(x: jax.Array, n: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
    """Return the mean of `n` values, zero of none."""
    # A power of two scales without rounding; so scaled, a sum overflows only if its mean does.
    n = jnp.maximum(n, 1)
    unit = lax.reduce_precision(1 / n, jnp.finfo(n.dtype).nexp, 0)
    return total(x * unit, axes, mask) / (n * unit)


def total(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None) -> jax.Array:
    return jnp.sum(x, axes, where=mask, keepdims=True)
