"""Batch renormalization."""

from collections.abc import Hashable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _checks
from jaxbn._batch_norm import Params, normalize_and_update
from jaxbn._options import Options
from jaxbn._running import Estimator, State

StateT = TypeVar("StateT", bound=State)


def batch_renorm(
    params: Params,
    state: StateT,
    x: ArrayLike,
    train: bool,
    *,
    r_max: ArrayLike,
    d_max: ArrayLike,
    axis: int | Sequence[int] = -1,
    momentum: float | None = 0.9,
    epsilon: float = 1e-5,
    batch_variance: Estimator = "biased",
    running_variance: Estimator = "unbiased",
    axis_name: Hashable | Sequence[Hashable] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    virtual_batch_size: int | None = None,
) -> tuple[jax.Array, StateT]:
    r"""Normalize a batch by batch renormalization, and return it with the new state.

    Batch renormalization brings training closer to evaluation. With the standard deviation
    :math:`s = \sqrt{\sigma^2 + \epsilon}`, it computes in training

    .. math::

        r &= \mathrm{clip}\left(\frac{s_\mathrm{batch}}{s_\mathrm{running}},
            \frac{1}{r_\mathrm{max}}, r_\mathrm{max}\right), \quad
        d = \mathrm{clip}\left(\frac{\mu_\mathrm{batch} - \mu_\mathrm{running}}
            {s_\mathrm{running}}, -d_\mathrm{max}, d_\mathrm{max}\right)

        y &= \mathrm{scale} \cdot \left(\frac{x - \mu_\mathrm{batch}}{s_\mathrm{batch}} \cdot r
            + d\right) + \mathrm{bias}

    with the running statistics before the update. Where nothing is clipped, the output is that of
    evaluation, so a small or unrepresentative batch distorts the output less. No gradient flows
    through r and d: the gradient is that of batch norm, times r. Evaluation and the update of the
    state are those of `batch_norm`, and so is training with `r_max=1, d_max=0` (up to rounding, if
    the limits are traced).

    In the first steps, the running statistics are unreliable. Begin with `r_max=1, d_max=0`, and
    relax both gradually to 3 and 5, as the paper does. They may be traced, so a schedule does not
    cause recompilation. Since the output depends on the state, NaN in the state makes the output
    NaN, even with `r_max=1, d_max=0` if these are traced. `keep_finite` keeps NaN out of the state.

    Args:
      params, x, train, axis, momentum, batch_variance, running_variance, axis_name: as in
        `batch_norm`.
      axis_index_groups, mask, dtype, virtual_batch_size: as in `batch_norm`. Each group of examples
        has its own r and d.
      state: as in `batch_norm`, but not None.
      r_max: the limit of r, the ratio of the batch's standard deviation to the running one, which
        is clipped to [1 / r_max, r_max]; a scalar of at least 1, which may be infinite.
      d_max: the limit of d, the shift of the batch's mean from the running mean in running standard
        deviations; a scalar of at least 0, which may be infinite.
      epsilon: the number that is added to both variances, as in `batch_norm`.

    Returns:
      `y` and the new state, as in `batch_norm`.

    Raises:
      ValueError, TypeError: as in `batch_norm`; `x` is complex; `state` is None; or `r_max` or
        `d_max` is out of its range.

    Example:
      >>> import jax, jaxbn
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 16))
      >>> params, state = jaxbn.init(x.shape)
      >>> y, new = jaxbn.batch_renorm(params, state, x, train=True, r_max=10, d_max=10)
      >>> evaluation, _ = jaxbn.batch_norm(params, state, x, train=False)
      >>> print(abs(y - evaluation).max() < 1e-5)
      True

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", 2017, algorithm 1. There, the running standard deviation is an average
    of standard deviations, as in Keras (`renorm=True`); here it is the square root of the running
    variance plus epsilon.
    """
    _checks.renorm_limit("r_max", r_max, least=1)
    _checks.renorm_limit("d_max", d_max, least=0)
    _checks.real("x", x)
    _checks.mapping("state", state, advice="; batch renormalization needs running statistics")
    options = Options(
        axis=axis,
        momentum=momentum,
        epsilon=epsilon,
        batch_variance=batch_variance,
        running_variance=running_variance,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
    )

    def correct(mean_high, mean_low, var, running_mean, running_var):
        dtype = var.dtype
        largest_r, largest_d = jnp.asarray(r_max, dtype), jnp.asarray(d_max, dtype)
        eps = jnp.asarray(epsilon, dtype)
        running_std = jnp.sqrt(running_var + eps)
        r = jnp.sqrt(var + eps) / running_std
        d = ((mean_high - running_mean) + mean_low) / running_std
        return jnp.clip(r, 1 / largest_r, largest_r), jnp.clip(d, -largest_d, largest_d)

    if _checks.known_number(r_max) == 1 and _checks.known_number(d_max) == 0:
        # The program of batch norm, which compilers would round differently beside a correction.
        return normalize_and_update(params, state, x, train, options, mask, dtype)
    return normalize_and_update(params, state, x, train, options, mask, dtype, correct)
