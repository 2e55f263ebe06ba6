"""Support complex inputs, whose mean is complex and whose variance, `E[|x - mean|²]`, is real.

The moments of a complex batch are computed from those of its real and imaginary parts: the parts of
the mean are their means, and the variance is the sum of their variances.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._moments import moments as real_moments
from jaxbn._readings import Moments


def is_complex(*values: ArrayLike) -> bool:
    return any(map(jnp.iscomplexobj, values))


def complex_like(dtype: DTypeLike, real: DTypeLike) -> jnp.dtype:
    """Return the dtype `real` or, if `dtype` is complex, the complex dtype with such parts."""
    if not jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.dtype(real)
    return jnp.dtype(jnp.complex128 if real == jnp.float64 else jnp.complex64)


def parts(value: jax.Array, n_parts: int) -> Sequence[jax.Array]:
    """Return the real and imaginary parts if `n_parts` is 2, or the value itself if it is 1."""
    return [value] if n_parts == 1 else [jnp.real(value), jnp.imag(value)]


def from_parts(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else lax.complex(*parts)


def moments(
    x: jax.Array,
    mask: jax.Array | None,
    running_mean: jax.Array | None,
    input_dtype: DTypeLike,
    axes: tuple[int, ...],
    *sharing: Any,
) -> Moments:
    """Return the moments of a batch, which may be complex, as `jaxbn._moments.moments` does."""
    if not is_complex(x):
        return real_moments(x, mask, running_mean, input_dtype, axes, *sharing)

    def stacked(value: jax.Array | None) -> jax.Array | None:
        return None if value is None else jnp.stack(parts(value, 2))

    mask = None if mask is None else mask[None]
    axes = tuple(a + 1 for a in axes)
    dtype = jnp.finfo(input_dtype).dtype
    n, mean_high, mean_low, var = real_moments(
        stacked(x), mask, stacked(running_mean), dtype, axes, *sharing
    )
    return Moments(n[0], lax.complex(*mean_high), lax.complex(*mean_low), var[0] + var[1])
