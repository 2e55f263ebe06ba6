"""Inputs in half precision, for which sums about zero are accurate enough.

Let the mean of a feature be r deviations from zero. Rounding to half precision has moved its values
by up to r u deviations, where u is 2^-8 in bfloat16 and 2^-11 in float16. Sums about zero in
float32 lose a few r² 2^-24 of the variance, which moves an output by half of that. In bfloat16 this
is less than r u for every r at which values still differ, and in float16 for all but the last: they
differ for r < 1 / u.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxbn._readings import ShiftedMoments


def is_half(dtype: DTypeLike) -> bool:
    """Return whether a dtype has 16 bits or fewer."""
    return jnp.finfo(dtype).bits <= 16


def exact_if_constant(batch: ShiftedMoments, input_dtype: DTypeLike) -> ShiftedMoments:
    """Return the moments, of sums about zero, with those of a constant feature exact.

    Numbers of `input_dtype` are much further apart than the rounding error of a mean. If a mean is
    within that error of such a number, it is replaced by the number, which adds no larger an error.
    If the variance is then below the rounding errors of the sums, or NaN because squares overflow,
    it becomes zero. (In float16, values that differ may have a variance as small, so there only a
    variance that is not positive becomes zero.)
    """
    mean = batch.shift + batch.mean
    # The exponent keeps its bits, as reduce_precision has no subnormal numbers.
    nexp, nmant = jnp.finfo(mean.dtype).nexp, jnp.finfo(input_dtype).nmant
    nearest = lax.reduce_precision(mean, nexp, nmant)
    is_close = jnp.abs(mean - nearest) <= 2.0**-20 * jnp.abs(mean)
    rounding = 2.0**-20 if nmant < 10 else 0.0
    is_constant = is_close & ~(batch.var > rounding * jnp.square(mean))
    mean = jnp.where(is_close, nearest, mean)
    var = jnp.where(is_constant, 0, batch.var)
    return ShiftedMoments(batch.n, mean, jnp.zeros_like(mean), var)
