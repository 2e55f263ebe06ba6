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

from jaxbn._readings import Moments, ShiftedMoments


def is_half(dtype: DTypeLike) -> bool:
    return jnp.finfo(dtype).bits <= 16


def exact_if_constant(batch: ShiftedMoments, input_dtype: DTypeLike) -> Moments:
    """Return the moments, with the mean of a constant feature exact, and its variance zero.

    The values are numbers of `input_dtype`, which are far apart beside the rounding errors of a
    mean. Where a mean is that close to such a number, taking the number adds no larger an error.
    Where the variance is then less than if values were one apart from the next, or NaN as their
    squares overflow, they are equal. (In float16 the rounding errors of sums may be more than that,
    and remain.)
    """
    mean = batch.shift + batch.mean
    # The exponent keeps its bits, as reduce_precision has no subnormal numbers.
    nexp, nmant = jnp.finfo(mean.dtype).nexp, jnp.finfo(input_dtype).nmant
    nearest = lax.reduce_precision(mean, nexp, nmant)
    is_close = jnp.abs(mean - nearest) <= 2.0**-20 * jnp.abs(mean)
    unit_roundoff = 2.0 ** -(nmant + 1)
    is_constant = is_close & ~(batch.var > jnp.square(unit_roundoff * mean))
    mean = jnp.where(is_close, nearest, mean)
    var = jnp.where(is_constant, 0, batch.var)
    return Moments(batch.n, mean, jnp.zeros_like(mean), var)
