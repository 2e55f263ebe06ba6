"""Batch normalization: `init` makes its parameters and state, `batch_norm` computes it."""

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _checks
from jaxbn._ghost import in_groups, kept_axes
from jaxbn._moments import NAME as MOMENTS_NAME
from jaxbn._moments import Moments, apart, moments, statistics_dtype
from jaxbn._running import Estimator, State, update, variance

Params = Mapping[str, jax.Array]
_KEEP_MOMENTS = jax.checkpoint_policies.save_only_these_names(MOMENTS_NAME)
StateT = TypeVar("StateT", bound=State | None)


def init(
    shape: Sequence[int],
    axis: int | Sequence[int] = -1,
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: DTypeLike = jnp.float32,
    keepdims: bool = False,
    track_count: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters and state of a batch norm over inputs of one shape.

    Args:
      shape: the input's shape. Only the sizes along `axis` matter.
      axis: the feature axis, or axes; every other axis is reduced.
      use_scale: whether the parameters hold a `scale`, ones.
      use_bias: whether the parameters hold a `bias`, zeros.
      param_dtype: the parameters' dtype. The state has it too, but never less than float32.
      keepdims: leaves of the shape that broadcasts against the input, (1, C, 1, 1), not (C,).
      track_count: whether the state counts training batches, which `momentum=None` needs.

    Returns:
      `params`, with `scale` and `bias`, and `state`, with `mean` (zeros), `var` (ones) and, where
      asked for, `count` (int32, 0).

    Raises:
      ValueError: `shape` is no sequence of sizes, or `axis` is out of its range.
      TypeError: `param_dtype` is not floating.

    Example:
      >>> import jax, jaxbn
      >>> params, state = jaxbn.init((64, 16, 32, 32), axis=1)
      >>> jax.tree.map(lambda leaf: leaf.shape, {**params, **state})
      {'bias': (16,), 'mean': (16,), 'scale': (16,), 'var': (16,)}
    """
    shape = _checks.shape(shape)
    feature_axes = _checks.feature_axes(axis, shape)
    param_dtype = _checks.floating_dtype("param_dtype", param_dtype)
    state_dtype = statistics_dtype(param_dtype)
    kept = range(len(shape)) if keepdims else feature_axes
    leaf = tuple(shape[a] if a in feature_axes else 1 for a in kept)

    params = {}
    if use_scale:
        params["scale"] = jnp.ones(leaf, param_dtype)
    if use_bias:
        params["bias"] = jnp.zeros(leaf, param_dtype)
    state = {"mean": jnp.zeros(leaf, state_dtype), "var": jnp.ones(leaf, state_dtype)}
    if track_count:
        state["count"] = jnp.zeros((), jnp.int32)
    return params, state


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
    r"""Batch normalization of `x`, and the state after it.

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
        the features' shape, (C,), or the one that broadcasts against `x`, such as (1, C, 1, 1).
      state: a mapping with `mean`, `var` and, optionally, `count`, of the same shapes (`count` is a
        scalar of at least 32 bits). None means that none is kept: the batch's own statistics are
        used in both modes.
      x: the input, of any floating dtype but float8_e8m0fnu (which has no zero) and float6, with
        features on `axis`. In float32 a feature may deviate by up to 1e16 from its mean, which its
        square does not overflow.
      train: whether to use, and to track, the batch's statistics; a Python bool.
      axis: the feature axis, or axes; every other axis is reduced.
      momentum: the weight of the old value, in [0, 1]; PyTorch's `momentum` is one minus it. None
        weighs all batches so far alike, and needs `count` in the state. It counts a batch once, for
        all features and both statistics, so a `mask` must then have size 1 along the features, and
        `running_variance` must be "biased".
      epsilon: what is added to the variance, in units of `x` squared; a number that is finite in
        the dtype of the statistics.
      batch_variance: the estimator that normalizes, "biased" (divided by n) or "unbiased" (n - 1).
      running_variance: the estimator that is tracked.
      axis_name: the mapped axis, or axes, (of `vmap`, `pmap`, `shard_map`) that share statistics.
        Under `jit` with sharded arrays none is needed. Evaluation with a state ignores it. Where
        `state` is None, evaluation uses the statistics of the batch, so it shares them as training
        does, and the axis must be bound.
      axis_index_groups: groups of indices of `axis_name` that share statistics, all of one size;
        by default all do. JAX has them in `pmap` and in `shard_map` with `check_vma=False` only.
      mask: booleans that broadcast against `x`, True where a value counts. What lies under False
        touches nothing; the output there is `bias`. A batch without a value that counts leaves the
        state as it is.
      dtype: the dtype of `y`, by default that of `x`.
      virtual_batch_size: normalizes groups of so many examples, those next to one another on the
        first axis that is not a feature's, by statistics of their own (ghost batches). The state
        moves towards the mean of the groups' statistics, over the devices of `axis_name` too,
        which then share nothing else.

    Returns:
      `y`, of the shape of `x`, and the new state, of the shapes of the old. Statistics are computed
      in float32, or float64 where `x` is, and kept in it or in the state's dtype where that is
      wider, whatever the dtypes of `momentum` and `epsilon`. The new state is a mapping of the same
      kind as the old one (a `FrozenDict` for a `FrozenDict`), or a dict where that kind is not
      registered as a pytree. No gradient flows into it. Evaluation returns `state` itself.

    Raises:
      ValueError: an argument that is out of its range or does not fit the others; one value per
        feature where an unbiased variance is asked for.
      TypeError: an argument of the wrong dtype.

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
    x = _checks.floating_array("x", x)
    feature_axes = _checks.feature_axes(axis, x.shape)
    _checks.params(params, x.shape, feature_axes)
    _checks.state(state, x.shape, feature_axes)
    train = _checks.python_bool("train", train)
    use_batch = train or state is None
    _checks.momentum(momentum, state, train)
    _checks.epsilon(epsilon, use_batch, statistics_dtype(x.dtype))
    _checks.estimator("batch_variance", batch_variance)
    _checks.estimator("running_variance", running_variance)
    mask = _checks.mask(mask, x.shape)
    if momentum is None and mask is not None and train and state is not None:
        _checks.cumulative_average(mask.shape, feature_axes, running_variance)
    dtype = x.dtype if dtype is None else _checks.floating_dtype("dtype", dtype)
    _checks.axis_index_groups(axis_index_groups, axis_name)
    ghosts = _checks.virtual_batch_size(virtual_batch_size, x.shape, feature_axes, use_batch)
    # The devices share the statistics that normalize, or, of ghost batches, those that are tracked.
    normalized_over, tracked_over = (axis_name, axis_index_groups), (None, None)
    if ghosts is not None:
        normalized_over, tracked_over = tracked_over, normalized_over
    if use_batch:
        _checks.axis_name(axis_name, axis_index_groups)
        if "unbiased" in (batch_variance, running_variance):
            _checks.more_than_one_value(x.shape, feature_axes, ghosts, *normalized_over)

    features = tuple(n if a in feature_axes else 1 for a, n in enumerate(x.shape))
    kept = feature_axes if ghosts is None else kept_axes(feature_axes, ghosts[0])
    dtype_of_statistics = statistics_dtype(x.dtype)

    def feature(leaf: ArrayLike) -> jax.Array:
        return jnp.asarray(leaf, dtype_of_statistics).reshape(features)

    # The backward pass needs x, as it came, and the moments. The rest is arithmetic on single
    # values, which costs less to repeat than to keep.
    @partial(jax.checkpoint, policy=_KEEP_MOMENTS, prevent_cse=False)
    def normalize(
        x: jax.Array, mask: jax.Array | None, scale: jax.Array, bias: jax.Array
    ) -> tuple[jax.Array, Moments | None]:
        narrow, x = x, x.astype(dtype_of_statistics)
        if use_batch:
            reduced_axes = tuple(a for a in range(x.ndim) if a not in kept)
            batch = moments(x, narrow, mask, reduced_axes, *normalized_over)
            shift, mean = lax.stop_gradient(batch.shift), batch.mean
            var = variance(batch, batch_variance)
        else:
            assert state is not None
            batch = None
            shift, mean, var = feature(state["mean"]), 0, feature(state["var"])
        # y = scale (x - shift - mean) / sqrt(var + epsilon) + bias, with all that is constant
        # within a feature computed once, so that its derivative takes two sums and one pass.
        slope = scale / jnp.sqrt(var + jnp.asarray(epsilon, dtype_of_statistics))
        offset = bias - mean * slope
        if mask is None:
            y = _line(x, narrow, shift, slope, offset)
        else:
            x = jnp.where(mask, x, shift)
            y = jnp.where(mask, _line(x, x, shift, slope, offset), bias)
        return y.astype(dtype), batch

    scale = feature(params.get("scale", jnp.ones(features)))
    bias = feature(params.get("bias", jnp.zeros(features)))
    if ghosts is None:
        y, batch = normalize(x, mask, scale, bias)
        batches = jax.tree.map(lambda leaf: leaf[None], batch)
    else:
        y, batches = in_groups(normalize, *ghosts)(x, mask, scale, bias)
    if state is None or batches is None:
        return y, state
    new_state = update(state, batches, momentum, running_variance, *tracked_over)
    return y, cast(StateT, lax.stop_gradient(new_state))


@jax.custom_jvp
def _line(
    x: jax.Array, narrow: jax.Array, shift: jax.Array, slope: jax.Array, offset: jax.Array
) -> jax.Array:
    del narrow
    return (x - shift) * slope + offset


@_line.defjvp
def _line_jvp(primals, tangents):
    """The product rule, as it would be found without being written, but for `apart`."""
    x, narrow, shift, slope, _ = primals
    dx, _, dshift, dslope, doffset = tangents
    own_x, own_shift = apart(x, narrow, shift)
    return _line(*primals), (dx - dshift) * slope + (own_x - own_shift) * dslope + doffset
