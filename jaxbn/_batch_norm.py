"""Batch normalization."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _fusion
from jaxbn._call import checked
from jaxbn._complex import moments
from jaxbn._ghost import in_groups
from jaxbn._moments import keep_only_moments
from jaxbn._options import Options
from jaxbn._running import Estimator, State, update, variance

Params = Mapping[str, jax.Array]
StateT = TypeVar("StateT", bound=State | None)
# Takes the mean of a batch, as the unevaluated sum of two floats, its variance, and the running
# mean and variance; returns r and d of batch renormalization.
Correction = Callable[..., tuple[jax.Array, jax.Array]]


def batch_norm(
    params: Params,
    state: StateT,
    x: ArrayLike,
    train: bool,
    *,
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
    r"""Normalize a batch, and return it with the new state.

    .. math::

        y = \mathrm{scale} \cdot \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \mathrm{bias}

    In training, :math:`\mu` and :math:`\sigma^2` are the mean and variance of the batch, over every
    axis but `axis` and over the devices of `axis_name`, and the state moves towards them:

    .. math::

        \mathrm{running} \leftarrow
            \mathrm{momentum} \cdot \mathrm{running} + (1 - \mathrm{momentum}) \cdot \mathrm{batch}

    In evaluation, they are the running mean and variance, and the state is returned unchanged.

    The defaults are those of PyTorch, `PYTORCH`; the layers of `jaxbn.linen` and `jaxbn.nnx` have
    those of Flax, `FLAX`. To choose a convention, pass it: `batch_norm(..., **jaxbn.KERAS)`.

    Args:
      params: a mapping with `scale` and `bias`, either or both of which may be missing. Leaves have
        the shape of the features, (C,), or one that broadcasts against `x`, such as (1, C, 1, 1).
      state: a mapping with `mean`, `var` and, optionally, `count`, of the same shapes (`count` is a
        scalar of at least 32 bits). With None, nothing is tracked, and the statistics of the
        batch are used in both modes.
      x: the input, of any floating dtype but float8_e8m0fnu (which has no zero) and float6, with
        features on `axis`. Complex inputs have a complex mean and a real variance, that of
        `|x - mean|`; `scale` and `bias` may be real or complex. A feature may deviate by up to 1e16
        from its mean in float32, and from zero in half precision, so that squares do not overflow.
      train: whether to use and to track the statistics of the batch; a Python bool.
      axis: the feature axis, or axes; every other axis is reduced.
      momentum: the weight of the old value, in [0, 1]; PyTorch's `momentum` is one minus it. With
        None, all batches so far have the same weight, which needs `count` in the state. It counts a
        batch once, for all features and both statistics, so a `mask` must then have size 1 along
        the features, and `running_variance` must be "biased".
      epsilon: the number that is added to the variance, in units of `x` squared; finite in the
        dtype of the statistics, and positive where the statistics of the batch are used.
      batch_variance: the estimator of the variance that normalizes the batch, "biased" (divided by
        n) or "unbiased" (by n - 1).
      running_variance: the estimator of the variance that is tracked.
      axis_name: the mapped axis, or axes, (of `vmap`, `pmap`, `shard_map`) that share statistics.
        Under `jit` with sharded arrays none is needed. Evaluation with a state ignores it; without
        a state it shares statistics as training does, so the axis must be bound.
      axis_index_groups: groups of indices of `axis_name` that share statistics, all of the same
        size; by default all indices do. JAX supports groups only in `pmap`, and in `shard_map` with
        `check_vma=False`.
      mask: booleans that broadcast against `x`, True where a value counts. Masked-out values affect
        nothing, and the output there is `bias`. A batch in which no value counts leaves the state
        unchanged.
      dtype: the dtype of `y`, by default that of `x`; complex if `x`, `scale` or `bias` is.
      virtual_batch_size: normalizes each group of this many consecutive examples, along the first
        non-feature axis, with that group's own statistics (ghost batches). The last group is
        smaller if the number of examples is not a multiple. The state moves towards the mean of
        the statistics of all groups, regardless of their sizes, on all devices of `axis_name`,
        which then share nothing else.

    Returns:
      `y`, of the shape of `x`, and the new state, of the shapes of the old. Statistics are computed
      in float32, or in float64 if `x` is, and kept in that dtype or in that of the state, whichever
      is wider, regardless of the dtypes of `momentum` and `epsilon`. The new state is a mapping of
      the same kind as the old one (a `FrozenDict` for a `FrozenDict`), or a dict if that kind is
      not registered as a pytree. No gradient flows into it. Evaluation returns `state` itself.

    Raises:
      ValueError: an argument is out of its range or does not fit the others; an unbiased variance
        is requested, but there is only one value per feature.
      TypeError: an argument has the wrong dtype, or `params` or `state` is not a mapping.

    Example:
      >>> import jax, jaxbn
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 4, 4, 16))
      >>> params, state = jaxbn.init(x.shape)
      >>> y, state = jaxbn.batch_norm(params, state, x, train=True)
      >>> print(f"{abs(y.mean()):.1f} {y.std():.1f}")
      0.0 1.0

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, algorithms 1 and 2.
    """
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
    return normalize_and_update(params, state, x, train, options, mask, dtype)


def normalize_and_update(
    params: Params,
    state: StateT,
    x: ArrayLike,
    train: bool,
    options: Options,
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
    correct: Correction | None = None,
) -> tuple[jax.Array, StateT]:
    """Return the normalized batch and the new state, as `batch_norm` does.

    Args:
      params, state, x, train, mask, dtype: as in `batch_norm`.
      options: the others.
      correct: the correction of batch renormalization, or None.
    """
    options.check()
    call = checked(params, state, x, train, options.axis, mask, dtype, options.virtual_batch_size)
    options.check_fit(call, state)

    scale = call.feature(params.get("scale", 1), call.params_dtype)
    bias = call.feature(params.get("bias", 0), call.params_dtype)
    running = None
    if state is not None:
        mean = call.feature(state["mean"], call.mean_dtype)
        running = mean, call.feature(state["var"], call.var_dtype)
    eps = jnp.asarray(options.epsilon, call.var_dtype)
    # Devices share the statistics that normalize or, with ghost batches, those that are tracked.
    devices, no_devices = (options.axis_name, options.axis_index_groups), (None, None)
    sharing, averaging = (devices, no_devices) if call.ghosts is None else (no_devices, devices)

    @keep_only_moments
    def normalize_by_running(x, mask, scale, bias, mean, var):
        wide = x.astype(mean.dtype)
        y = _normalize(wide, x.dtype, mask, scale, bias, mean, jnp.zeros_like(mean), var, eps)
        return y.astype(call.dtype)

    def normalize_by_batch(x, mask, scale, bias, running_mean, running_var):
        # Otherwise XLA for CPUs keeps and normalizes the wider values that `x` was rounded from.
        (x,) = _fusion.own_reading(x.dtype, x)
        wide = x.astype(call.mean_dtype)
        batch = moments(wide, mask, running_mean, x.dtype, call.axes, *sharing)
        mean = lax.stop_gradient(batch.mean_high), batch.mean_low
        var = variance(batch, options.batch_variance)
        r_and_d = None
        if correct is not None:
            r_and_d = lax.stop_gradient(correct(*mean, var, running_mean, running_var))
        y = _normalize(wide, x.dtype, mask, scale, bias, *mean, var, eps, r_and_d)
        return y.astype(call.dtype), batch

    if running is not None and not call.train:
        return normalize_by_running(call.x, call.mask, scale, bias, *running), state

    arguments = (call.x, call.mask, scale, bias, *(running or (None, None)))
    y, batches = in_groups(normalize_by_batch, call.ghosts)(*arguments)
    if state is None:
        return y, state
    new_state = update(state, batches, options.momentum, options.running_variance, *averaging)
    return y, cast(StateT, lax.stop_gradient(new_state))


def _normalize(x, input_dtype, mask, scale, bias, mean_high, mean_low, var, epsilon, r_and_d=None):
    """Return `scale (x - mean) / sqrt(var + epsilon) + bias`, and `bias` where the mask is False.

    With `r_and_d`, it is `scale ((x - mean) / sqrt(var + epsilon) r + d) + bias`. The slope and the
    offset are computed once per feature, so that the derivative takes two sums.
    """
    std = jnp.sqrt(var + epsilon)
    # For complex numbers only: `scale` has the dtype of the result.
    x, mean_high, mean_low, std = (v.astype(scale.dtype) for v in (x, mean_high, mean_low, std))
    factor, shifted_bias = scale, bias
    if r_and_d is not None:
        r, d = (value.astype(scale.dtype) for value in r_and_d)
        factor, shifted_bias = scale * r, bias + scale * d
    slope = factor / std
    offset = shifted_bias - mean_low * slope
    if mask is None:
        return _fusion.line(input_dtype, x, mean_high, slope, offset)
    # The mean is not a number of the input's dtype, so the line reads `x` in its wider one.
    x = jnp.where(mask, x, mean_high)
    return jnp.where(mask, _fusion.line(x.dtype, x, mean_high, slope, offset), bias)
