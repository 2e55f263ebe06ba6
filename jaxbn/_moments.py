"""Count, mean and variance of a batch, and their derivative, which is the same for every form."""

from collections.abc import Hashable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxbn import _fusion
from jaxbn._devices import across_devices
from jaxbn._half_precision import exact_if_constant, is_half
from jaxbn._readings import Moments, ShiftedMoments, moments_about, total
from jaxbn._readings import statistics_dtype as statistics_dtype
from jaxbn._separate_readings import moments_in_separate_readings
from jaxbn._shift import sample_mean

# The name of the moments for policies of `jax.checkpoint`.
NAME = "batch_norm_moments"
# The backward pass needs x, in its own dtype, and the moments. Everything else is elementwise
# arithmetic, which costs less to repeat than to keep.
keep_only_moments = partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(NAME),
    prevent_cse=False,
)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def moments(
    x: jax.Array,
    mask: jax.Array | None,
    running_mean: jax.Array | None,
    input_dtype: DTypeLike,
    axes: tuple[int, ...],
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    r"""Return the moments of `x` over `axes`, where `mask` is True, and over mapped devices.

    With deviations :math:`d = x - s` from a shift :math:`s`,

    .. math::

        \mu = s + E[d], \quad \sigma^2 = E[d^2] - E[d]^2

    need only one read of `x`. The closer the shift is to the mean, the more accurate they are: the
    rounding error of the sums, relative to the variance, is multiplied by
    :math:`E[d^2] / \sigma^2 = 1 + (s - \mu)^2 / \sigma^2`.

    The shift is the mean of at least a sixteenth of the values or, under a mask, of all of them
    (which reads `x` two more times). This bounds the factor for any data: if a fraction 1 / f of
    the values has the mean s, then the variance between this part and the rest is
    :math:`(s - \mu)^2 / (f - 1)`, and the whole variance is at least that. So the factor is at most
    f.

    For inputs in half precision the shift is zero (`jaxbn._half_precision` shows that this is
    enough). On a CPU, where sums do not share a read of `x`, it is the running mean or, for a
    feature far from it, the mean that a loop finds (`jaxbn._separate_readings`).

    Args:
      x: the batch, in the dtype of the statistics.
      mask: booleans of the rank of `x`, or None.
      running_mean: the expected mean, or None.
      input_dtype: the dtype of the input, from which `x` was converted.
      axes: the axes that are reduced.
      axis_name: the mapped axis or axes that share the statistics.
      axis_index_groups: the groups of its indices that do.

    The count and `mean_high` have no derivative. The derivatives of `mean_low` and `var` are
    `E[dx]` and `2 E[(x - mean) dx]`, whatever the shift.
    """
    batch = local_moments(x, mask, running_mean, input_dtype, axes)
    if axis_name is None:
        return batch
    return across_devices(batch, input_dtype, axis_name, axis_index_groups)


@moments.defjvp
def _moments_jvp(input_dtype, axes, axis_name, axis_index_groups, primals, tangents):
    x, mask, _ = primals
    dx, *_ = tangents
    batch = moments(*primals, input_dtype, axes, axis_name, axis_index_groups)
    batch = checkpoint_name(batch, NAME)
    # E[(x - mean) dx], with what is constant within a feature taken out of the sum.
    deviation = x - batch.mean_high
    if mask is not None:
        deviation, dx = (jnp.where(mask, value, 0) for value in (deviation, dx))
    sums = jnp.stack([total(dx, axes), total(deviation * dx, axes)])
    if axis_name is not None:
        sums = lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)
    dmean, product = (total / jnp.maximum(batch.n, 1) for total in sums)
    dvar = 2 * (product - batch.mean_low * dmean)
    return batch, Moments(jnp.zeros_like(batch.n), jnp.zeros_like(batch.mean_high), dmean, dvar)


# Compiled even if the caller is not: one by one, its operations would read the batch more often.
@partial(jax.jit, static_argnums=(3, 4))
def local_moments(
    x: jax.Array,
    mask: jax.Array | None,
    running_mean: jax.Array | None,
    input_dtype: DTypeLike,
    axes: tuple[int, ...],
) -> Moments:
    """Return the moments of the values on this device."""
    origin = jnp.zeros((), x.dtype)

    def in_one_reading(x: jax.Array) -> ShiftedMoments:
        if is_half(input_dtype):
            about_origin = moments_about(origin, x, mask, input_dtype, axes)
            return exact_if_constant(about_origin, input_dtype)
        return moments_about(sample_mean(x, mask, axes), x, mask, input_dtype, axes)

    def in_separate_readings(x: jax.Array) -> ShiftedMoments:
        expected = origin if running_mean is None else running_mean
        expected = jnp.where(jnp.isfinite(expected), expected, 0)
        return moments_in_separate_readings(x, mask, expected, input_dtype, axes)

    batch = _fusion.by_readings(x, one=in_one_reading, separate=in_separate_readings)
    if is_half(input_dtype):
        mean = batch.shift + batch.mean
        # Zero, but of all the mapped axes of the mean: JAX fails to differentiate `vmap` over
        # states if `mean_low` lacks an axis that its derivative has.
        zero = jnp.zeros_like(mean)
        return Moments(batch.n, mean, jnp.where(jnp.isnan(mean), zero, zero), batch.var)
    # A compiler may compute a fused value twice and round it differently, which would make the two
    # floats inconsistent. The barrier ensures that every use gets the same values.
    shift, mean = lax.optimization_barrier((batch.shift, batch.mean))
    mean_high = shift + mean
    return Moments(batch.n, mean_high, (shift - mean_high) + mean, batch.var)
