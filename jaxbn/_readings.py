"""Sums over a batch on one device, and the moments computed from them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxbn import _fusion


def statistics_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Return float64 if a dtype is of 64-bit numbers, and float32 otherwise."""
    is_wide = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    return jnp.dtype(jnp.float64 if is_wide else jnp.float32)


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


class ShiftedMoments(NamedTuple):
    """The moments of a batch from which a shift was subtracted."""

    n: jax.Array
    shift: jax.Array
    mean: jax.Array
    var: jax.Array


def moments_about(
    shift: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
    input_dtype: DTypeLike,
    axes: tuple[int, ...],
) -> ShiftedMoments:
    """Return the moments from the sums of the deviations from a shift and of their squares."""
    n = count(x, mask, axes)
    unit = _unit(n)
    size = jnp.maximum(n, 1) * unit
    own_x, own_shift, own_unit = _fusion.own_reading(input_dtype, x, shift, unit)
    mean = total((own_x - own_shift) * own_unit, axes, mask) / size
    own_x, own_shift, own_unit, _ = _fusion.own_reading(input_dtype, x, shift, unit, mean)
    deviation = own_x - own_shift
    # Scale before squaring: the square may overflow where the variance does not.
    square = total(deviation * (deviation * own_unit), axes, mask) / size
    return shifted_moments(n, shift, mean, square)


def shifted_moments(
    n: jax.Array, shift: jax.Array, mean: jax.Array, square: jax.Array
) -> ShiftedMoments:
    """Return the moments given the means of the deviations and of their squares."""
    var = jnp.maximum(square - jnp.square(mean), 0)
    return ShiftedMoments(n, shift + jnp.zeros_like(mean), mean, var)


def count(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """Return the number of values that count."""
    if mask is None:
        return jnp.full((1,) * x.ndim, math.prod(x.shape[a] for a in axes), x.dtype)
    copies = math.prod(x.shape[a] for a in axes if mask.shape[a] != x.shape[a])
    return total(mask.astype(x.dtype), axes) * jnp.asarray(copies, x.dtype)


def average(
    x: jax.Array, n: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None
) -> jax.Array:
    """Return the mean of `n` values, or zero if there are none."""
    unit = _unit(n)
    return total(x * unit, axes, mask) / (jnp.maximum(n, 1) * unit)


def total(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None) -> jax.Array:
    """Return the sum over `axes`, which stay as axes of size one.

    Axes that have size one already are summed over, too. This changes no value, but if one of them
    is left, XLA for CPUs (in JAX 0.10, not in 0.12) may accumulate sequentially, so that rounding
    errors grow with the number of values. An axis of size one that `vmap` maps is left.
    """
    ones = {a for a in unsharded(x) if x.shape[a] == 1}
    return jnp.sum(x, tuple({*axes} | ones), where=mask, keepdims=True)


def unsharded(x: jax.Array) -> list[int]:
    """Return the axes that are not explicitly sharded."""
    spec = jax.typeof(x).sharding.spec
    return [a for a in range(x.ndim) if a >= len(spec) or spec[a] is None]


def _unit(n: jax.Array) -> jax.Array:
    """Return the power of two next to 1 / n.

    Scaling normal numbers by it does not round, and the scaled sum overflows only if the mean
    nearly does.
    """
    return lax.reduce_precision(1 / jnp.maximum(n, 1), jnp.finfo(n.dtype).nexp, 0)
