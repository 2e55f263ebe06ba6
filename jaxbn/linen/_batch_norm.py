"""The Linen layer, which holds the parameters and the statistics. It does no arithmetic."""

from collections.abc import Hashable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ModifyScopeVariableError
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _call_checks, _checks, _layers
from jaxbn._batch_norm import batch_norm
from jaxbn._complex import complex_like
from jaxbn._init import init
from jaxbn._running import Estimator

# Initialization needs neither the devices nor more than one value.
_INITIALIZING = {
    "batch_variance": "biased",
    "running_variance": "biased",
    "axis_name": None,
    "axis_index_groups": None,
    "virtual_batch_size": None,
}


class BatchNorm(nn.Module):
    """Normalize a batch as `jaxbn.batch_norm` does, in a Flax Linen model.

    A drop-in replacement for `flax.linen.BatchNorm`: it takes the same arguments with the same
    defaults, and keeps the same variables (`scale` and `bias` in `params`, `mean` and `var` in
    `batch_stats`), so its checkpoints load. The defaults are Flax's convention, `jaxbn.FLAX`. For a
    model that comes from PyTorch, write `BatchNorm(**jaxbn.PYTORCH)`.

    These differences from Flax's layer remain. Where `mask` is False the output is `bias` and no
    gradient flows, in training and in evaluation; Flax normalizes masked-out values, and ignores
    the mask in evaluation. A batch in which no value counts leaves the statistics unchanged, and no
    gradient flows into updated statistics. `epsilon=0` in training and a traced
    `use_running_average` are rejected. For complex inputs, the running mean is complex from the
    start.

    As in Flax, initialization neither needs `axis_name` nor counts as a training step.

    Attributes:
      use_running_average: True in evaluation, where `batch_stats` is used and not updated; False in
        training. Give it either here or in the call.
      axis: the feature axis, or axes; every other axis is reduced.
      momentum: the weight of the old value, in [0, 1]; PyTorch's `momentum` is one minus it. None
        averages all batches so far with equal weights, and adds `count` to `batch_stats`. A `mask`
        must then have size 1 along the features, and `running_variance` must be "biased".
      epsilon: a small number that is added to the variance.
      dtype: the dtype of the result, by default the one that input and parameters promote to.
      param_dtype: the dtype of `scale` and `bias`.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: the initializer of the bias.
      scale_init: the initializer of the scale.
      axis_name: the mapped axis, or axes, that share statistics. Under `jit` with sharded arrays
        none is needed.
      axis_index_groups: groups of indices of `axis_name` that share statistics.
      use_fast_variance: accepted as in Flax, but has no effect: the variance is always accurate.
      force_float32_reductions: accepted as in Flax, but has no effect: statistics are computed and
        kept in at least float32.
      batch_variance: the estimator that normalizes, "biased" or "unbiased".
      running_variance: the estimator that is tracked.
      virtual_batch_size: normalizes each group of this many examples, and a smaller last group if
        some are left, with that group's own statistics, as `jaxbn.batch_norm` describes.
      frozen: whether the running statistics are always used and never updated, as in evaluation,
        regardless of `use_running_average`, which need not be given then. `scale`, `bias` and the
        input get the gradients of evaluation.
      track: whether training updates the running statistics. Without it, training normalizes with
        the statistics of the batch as usual, and `batch_stats` need not be mutable. Use it for
        further passes over a batch, as in sharpness-aware minimization or adversarial training.

    Example:
      >>> import jax, jaxbn.linen
      >>> x = jax.random.normal(jax.random.key(0), (8, 16))
      >>> layer = jaxbn.linen.BatchNorm(use_running_average=False)
      >>> variables = layer.init(jax.random.key(1), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> jax.tree.map(lambda leaf: leaf.shape, updates)
      {'batch_stats': {'mean': (16,), 'var': (16,)}}
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: Hashable | Sequence[Hashable] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    # Options that Flax's layer lacks come last, so that positional arguments mean the same.
    batch_variance: Estimator = "biased"
    running_variance: Estimator = "biased"
    virtual_batch_size: int | None = None
    frozen: bool = False
    track: bool = True

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize `x`, and in training move the running statistics towards those of the batch.

        Args:
          x: the input, with features on `axis`. As in Flax, integers and booleans are converted to
            floating numbers.
          use_running_average: see the attribute; exactly one of the two must be given, unless the
            layer is `frozen`.
          mask: an array that broadcasts against `x`, True or nonzero where a value counts.
            Masked-out values affect nothing, and the output there is `bias`.

        Returns:
          The normalized input, of the shape of `x`.

        Raises:
          ValueError, TypeError: an option or an argument is invalid, as for `jaxbn.batch_norm`.
          flax.errors.ModifyScopeVariableError: `batch_stats` is not mutable in training.
        """
        options = _layers.checked_options(self)
        train = not self.frozen and not _checks.python_bool(
            "use_running_average",
            nn.merge_param("use_running_average", self.use_running_average, use_running_average),
        )
        given, x = x, _layers.floating_input(x, self.dtype)
        feature_axes = _call_checks.feature_axes(self.axis, x.shape)
        features = tuple(x.shape[a] for a in feature_axes)

        # Statistics without a count are not given one here: an average that starts from a count of
        # zero would replace them.
        has_statistics = self.has_variable("batch_stats", "mean")
        track_count = self.has_variable("batch_stats", "count") or (
            self.momentum is None and not has_statistics
        )
        _, initial = init(
            features,
            range(len(features)),
            param_dtype=complex_like(x.dtype, jnp.float32),
            track_count=track_count,
        )
        stats = {
            name: self.variable("batch_stats", name, lambda leaf=leaf: leaf)
            for name, leaf in initial.items()
        }
        params = {}
        if self.use_scale:
            _checks.function("scale_init", self.scale_init)
            params["scale"] = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            _checks.function("bias_init", self.bias_init)
            params["bias"] = self.param("bias", self.bias_init, features, self.param_dtype)

        options["mask"] = _layers.boolean_mask(mask)
        options["dtype"] = canonicalize_dtype(given, *params.values(), dtype=self.dtype)
        if self.is_initializing() and train:
            # Only the shape and the dtype of the output matter, so any batch of one device will do.
            options |= _INITIALIZING
            return batch_norm(params, None, x, True, **options)[0]
        state = {name: stat.value for name, stat in stats.items()}
        y, state = _layers.function_of(self)(params, state, x, train, **options)
        if train and self.track:
            _assign(stats, state)
        return y


def _assign(stats: Mapping[str, nn.Variable], state: Mapping[str, jax.Array]) -> None:
    try:
        for name, stat in stats.items():
            stat.value = state[name]
    except ModifyScopeVariableError as error:
        error.add_note(
            "In training, BatchNorm updates its running statistics: call "
            "`y, updates = model.apply(variables, x, ..., mutable=['batch_stats'])`, or pass "
            "use_running_average=True to use them unchanged. With track=False they are not updated."
        )
        raise
