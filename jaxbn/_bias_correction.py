"""The bias correction of moving averages that start at zero."""

from typing import Any

import jax
import jax.numpy as jnp


# Compiled, so that it rounds as the expressions of Haiku and Equinox do inside `jit`.
@jax.jit
def bias_correction(momentum: Any, count: Any) -> jax.Array:
    r"""Return the divisor that makes a moving average unbiased: :math:`1 - m^{\mathrm{count}}`.

    This is the total weight of the batches in an average that starts at zero. It is 0 before the
    first batch.

    Args:
      momentum: the weight m of the old average in each update.
      count: the number of updates so far.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, section 3.
    """
    # A count is an integer, which JAX's strict promotion would reject as an exponent.
    with jax.numpy_dtype_promotion("standard"):
        return 1 - momentum**count


@jax.jit
def bias_corrected(momentum: Any, count: Any, *averages: jax.Array) -> tuple[jax.Array, ...]:
    """Return averages over their bias correction, or unchanged before the first batch."""
    correction = jnp.where(count == 0, 1, bias_correction(momentum, count))
    return tuple(average / correction for average in averages)
