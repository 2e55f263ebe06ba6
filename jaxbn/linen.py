"""`BatchNorm` for `flax.linen`: where its parameters and statistics live. No arithmetic."""

from collections.abc import Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Initializer
from jax.typing import DTypeLike

from jaxbn import _checks
from jaxbn._batch_norm import Estimator, batch_norm, init

__all__ = ["BatchNorm"]


class BatchNorm(nn.Module):
    """Batch normalization, as `jaxbn.batch_norm` computes it.

    A drop-in for `flax.linen.BatchNorm`: the same keywords, the same variables (`scale` and `bias`
    in `params`, `mean` and `var` in `batch_stats`), so that its checkpoints load. The defaults of
    `momentum` and `running_variance` are PyTorch's; `BatchNorm(**jaxbn.FLAX)` has Flax's.

    As in Flax, initialization neither needs `axis_name` nor counts as a training step.

    Attributes:
      use_running_average: True in evaluation: `batch_stats` normalizes, and stays as it is. False
        in training. Given here or at call.
      axis: the feature axis, or axes; every other axis is reduced.
      momentum: the weight of the old value, in [0, 1]; PyTorch's `momentum` is one minus it. None
        weighs all batches so far alike, and adds `count` to `batch_stats`.
      epsilon: what is added to the variance.
      dtype: the dtype of the result, by default the one that input and parameters promote to.
      param_dtype: the dtype of `scale` and `bias`.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: the mapped axis, or axes, that share statistics. Under `jit` with sharded arrays
        none is needed.
      axis_index_groups: groups of indices of `axis_name` that share statistics.
      batch_variance: the estimator that normalizes, "biased" or "unbiased".
      running_variance: the estimator that is tracked.
      virtual_batch_size: normalizes groups of so many examples by statistics of their own, as
        `jaxbn.batch_norm` says.

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
    momentum: float | None = 0.9
    epsilon: float = 1e-5
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: Hashable | Sequence[Hashable] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    batch_variance: Estimator = "biased"
    running_variance: Estimator = "unbiased"
    virtual_batch_size: int | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
          x: the input, of any floating dtype, with features on `axis`.
          use_running_average: see the attribute; one of the two must be given, and only one.
          mask: booleans that broadcast against `x`, True where a value counts. What lies under
            False touches nothing; the output there is `bias`.

        Returns:
          The normalized input, of the shape of `x`.

        Raises:
          ValueError, TypeError: as `jaxbn.batch_norm` does.
        """
        use_running_average = _checks.python_bool(
            "use_running_average",
            nn.merge_param("use_running_average", self.use_running_average, use_running_average),
        )
        x = _checks.floating_array("x", x)
        feature_axes = _checks.feature_axes(self.axis, x.shape)
        features = tuple(x.shape[a] for a in feature_axes)

        for name in ("batch_variance", "running_variance"):
            _checks.estimator(name, getattr(self, name))
        _checks.virtual_batch_size(self.virtual_batch_size, x.shape, feature_axes, use_batch=False)

        count = self.momentum is None or self.has_variable("batch_stats", "count")
        _, initial = init(features, range(len(features)), track_count=count)
        stats = {
            name: self.variable("batch_stats", name, lambda leaf=leaf: leaf)
            for name, leaf in initial.items()
        }
        params = {}
        if self.use_scale:
            params["scale"] = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            params["bias"] = self.param("bias", self.bias_init, features, self.param_dtype)

        options: dict[str, Any] = {
            "axis": self.axis,
            "epsilon": self.epsilon,
            "mask": mask,
            "dtype": canonicalize_dtype(x, *params.values(), dtype=self.dtype),
        }
        if self.is_initializing() and not use_running_average:
            # Only the output's shape and dtype matter: any batch will do, of one device.
            y, _ = batch_norm(
                params,
                None,
                x,
                True,
                batch_variance="biased",
                running_variance="biased",
                **options,
            )
            return y
        y, state = batch_norm(
            params,
            {name: stat.value for name, stat in stats.items()},
            x,
            not use_running_average,
            momentum=self.momentum,
            batch_variance=self.batch_variance,
            running_variance=self.running_variance,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            **options,
        )
        if not use_running_average:
            for name, stat in stats.items():
                stat.value = state[name]
        return y
