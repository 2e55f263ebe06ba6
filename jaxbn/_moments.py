"""Count, mean and variance of a batch, with one derivative however they are found."""

from collections.abc import Hashable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxbn._devices import across_devices
from jaxbn._readings import Moments as Moments
from jaxbn._readings import of_one_device, total
from jaxbn._readings import statistics_dtype as statistics_dtype

# The name of the moments for policies of `jax.checkpoint`.
NAME = "batch_norm_moments"


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
def moments(
    x: jax.Array,
    mask: jax.Array | None,
    running_mean: jax.Array | None,
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

    Of inputs in half precision the shift is the running mean, which is known before `x` is. At r
    deviations from the mean it costs r² 2^-24 of the variance. The rounding of the input itself has
    moved its values by r 2^-9 of a deviation in bfloat16, and by r 2^-12 in float16: more than that
    for every r at which such values still differ (2^8), or all but the last of them (2^10).

    On a CPU, where each sum reads `x` by itself, and a loop costs nothing while it does not run, the
    running mean is the first shift of all inputs, and a loop takes better ones where it is far.

    Args:
      x: the batch, in the dtype of the statistics.
      mask: booleans of the rank of `x`, or None.
      running_mean: None, or where the mean is expected. It serves as the shift of inputs in half
        precision and, on a CPU, as the first shift of any.
      narrow: the dtype in which the values of `x` came.
      axes: the axes that are reduced.
      axis_name: the mapped axis or axes that share the statistics.
      axis_index_groups: the groups of its indices that do.

    The count and `mean_high` have no derivative. Those of the others are `E[dx]` and
    `2 E[(x - mean) dx]`, whatever the shift.
    """

    batch = of_one_device(x, mask, running_mean, narrow, axes)
    if axis_name is None:
        return batch
    return across_devices(batch, axis_name, axis_index_groups)


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
    sums = jnp.stack([total(dx, axes), total(deviation * dx, axes)])
    if axis_name is not None:
        sums = lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)
    dmean, product = (total / jnp.maximum(batch.n, 1) for total in sums)
    dvar = 2 * (product - batch.mean_low * dmean)
    return batch, Moments(jnp.zeros_like(batch.n), jnp.zeros_like(batch.mean_high), dmean, dvar)
