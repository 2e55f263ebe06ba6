"""The moments of a batch on one device."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

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
    running_mean: jax.Array | None,
    narrow: DTypeLike,
    axes: tuple[int, ...],
) -> Moments:
    """Return the moments of the batch on this device; see `jaxbn._moments.moments`."""
    expected = jnp.zeros((), x.dtype)
    if running_mean is not None:
        expected = jnp.where(jnp.isfinite(running_mean), running_mean, 0)

    def once(x: jax.Array) -> Moments:
        if running_mean is None or jnp.finfo(narrow).bits > 16:
            return _about(_sample_mean(x, mask, axes), x, mask, narrow, axes)
        return _at_constant(_about(expected, x, mask, narrow, axes), narrow)

    def until_accurate(x: jax.Array) -> Moments:
        first = _by_examples(expected, x, mask, narrow, axes)
        about = partial(_about, x=x, mask=mask, narrow=narrow, axes=axes)
        return _until_accurate(first, expected, about)

    # On a CPU these come out of a loop, and are the same numbers wherever they are used. A compiler
    # may compute what it fuses twice, and round it otherwise, which this sum would not forgive.
    n, shift, mean, var = _fusion.by_platform(x, default=once, cpu=until_accurate)
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
    unit = _unit(n)
    size = jnp.maximum(n, 1) * unit
    own_x, own_shift = _fusion.apart(narrow, x, shift)
    mean = total((own_x - own_shift) * unit, axes, mask) / size
    own_x, own_shift, _ = _fusion.apart(narrow, x, shift, mean)
    deviation = own_x - own_shift
    # The unit comes before the square, which may overflow where the variance does not.
    square = total(deviation * (deviation * unit), axes, mask) / size
    var = jnp.maximum(square - jnp.square(mean), 0)
    return Moments(n, shift + jnp.zeros_like(mean), mean, var)


def _by_examples(
    shift: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
    narrow: DTypeLike,
    axes: tuple[int, ...],
) -> Moments:
    """Return the same, with the shift taken from the sum of each example and not from each value.

    On a CPU this takes less time: what is done to a value before it is added costs as much as half
    of a reading. An example's sum is about zero, and has roundings of its own size.
    """
    examples, inner = axes[:1], axes[1:]
    n, n_example = count(x, mask, axes), count(x, mask, inner)
    size = jnp.maximum(n, 1)
    own_x, own_shift = _fusion.apart(narrow, x, shift)
    mean = total(total(own_x, inner, mask) - n_example * own_shift, examples) / size
    own_x, own_shift, _ = _fusion.apart(narrow, x, shift, mean)
    square = total(jnp.square(own_x - own_shift), axes, mask) / size
    var = jnp.maximum(square - jnp.square(mean), 0)
    return Moments(n, shift + jnp.zeros_like(mean), mean, var)


def _at_constant(batch: Moments, narrow: DTypeLike) -> Moments:
    """Return moments about a shift, with the mean of a constant feature that constant.

    The mean of equal values, which are of the dtype `narrow`, is off by the roundings of the shift
    and of the sum. To move any mean by as little is harmless.
    """
    mean = batch.mean_high + batch.mean_low
    nearest = mean.astype(narrow).astype(mean.dtype)
    is_close = jnp.abs(mean - nearest) <= 2.0**-20 * jnp.maximum(
        jnp.abs(batch.mean_low), jnp.abs(mean)
    )
    high = jnp.where(is_close, nearest, batch.mean_high)
    return batch._replace(mean_high=high, mean_low=jnp.where(is_close, 0, batch.mean_low))


def _until_accurate(
    first: Moments, shift: jax.Array, about: Callable[[jax.Array], Moments]
) -> Moments:
    """Return the moments `first` or, of features where they are inaccurate, those about their mean.

    They are accurate where the shift is within one deviation of the mean, which at most doubles the
    error of the sums, and within four of zero, as the sums of examples in `first` are about zero. A
    third pass is about the number nearest to the mean: of equal values, their value. On a CPU a
    loop that does not run costs nothing.
    """

    def is_far(batch):
        return ~((jnp.abs(batch.mean_low) <= jnp.sqrt(batch.var)) & (batch.var < jnp.inf))

    def needs_another(passes_far_batch):
        passes, far, _ = passes_far_batch
        return (passes < 3) & jnp.any(far)

    def another(passes_far_batch):
        passes, far, batch = passes_far_batch
        new = about(jnp.where(jnp.isfinite(batch.mean), batch.mean, 0))
        # The count is the same, and may have the shape of a single number.
        mended = {
            name: jnp.where(far, getattr(new, name), getattr(batch, name))
            for name in ("mean_high", "mean_low", "var")
        }
        return passes + 1, far & is_far(new), batch._replace(**mended)

    far = is_far(first) | ~(jnp.abs(shift) <= 4 * jnp.sqrt(first.var))
    return lax.while_loop(needs_another, another, (jnp.ones((), jnp.int32), far, first))[-1]


def count(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Return the number of values that count."""
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(x.shape[a] for a in axes), x.dtype)
    copies = math.prod(x.shape[a] for a in axes if mask.shape[a] != x.shape[a])
    return total(mask.astype(x.dtype), axes) * jnp.asarray(copies, x.dtype)


def _mean(x: jax.Array, n: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
    """Return the mean of `n` values, zero of none."""
    unit = _unit(n)
    return total(x * unit, axes, mask) / (jnp.maximum(n, 1) * unit)


def _unit(n: jax.Array) -> jax.Array:
    """Return the power of two next to 1 / n: it scales without rounding."""
    return lax.reduce_precision(1 / jnp.maximum(n, 1), jnp.finfo(n.dtype).nexp, 0)


def total(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None) -> jax.Array:
    return jnp.sum(x, axes, where=mask, keepdims=True)
