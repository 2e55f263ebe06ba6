"""`BatchNorm` for `flax.nnx`: where its parameters and statistics live. No arithmetic."""

import operator
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
from flax.typing import Initializer
from jax.typing import DTypeLike

from jaxbn import _checks
from jaxbn._batch_norm import Estimator, batch_norm, init

__all__ = ["BatchNorm"]


class BatchNorm(nnx.Module):
    """Batch normalization, as `jaxbn.batch_norm` computes it.

    A drop-in for `flax.nnx.BatchNorm`: the same keywords, but for `use_fast_variance` and
    `promote_dtype`, and the same variables (`scale` and `bias` are `Param`, `mean` and `var` are
    `BatchStat`), so that its checkpoints load. The defaults of
    `momentum` and `running_variance` are PyTorch's; `BatchNorm(n, **jaxbn.FLAX, rngs=rngs)` has
    Flax's.

    A layer is frozen, within a model that trains, by `use_running_average=True`: its statistics
    normalize and stay as they are, and `scale`, `bias` and the input get the gradients of
    evaluation. As `model.train()` reaches every layer, freeze after it, `model.norm.eval()`, or at
    call.

    Attributes:
      num_features: the size of the feature axis, or the sizes of several, in the input's order.
      use_running_average: True in evaluation: `mean` and `var` normalize, and stay as they are.
        False in training. `train()`, `eval()` and `nnx.view` set it, and a call may override it,
        which None leaves to the call.
      axis: the feature axis, or axes; every other axis is reduced.
      momentum: the weight of the old value, in [0, 1]; PyTorch's `momentum` is one minus it. None
        weighs all batches so far alike, and adds the `BatchStat` `count`.
      epsilon: what is added to the variance.
      dtype: the dtype of the result, by default the one that input and parameters promote to.
      param_dtype: the dtype of `scale` and `bias`. `mean` and `var` begin with it too, but with
        float32 at least.
      use_bias: whether there is a bias; without, `bias` is None.
      use_scale: whether there is a scale; without, `scale` is None.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: the mapped axis, or axes, that share statistics. Under `jit` with sharded arrays
        none is needed. Construction and evaluation do not look at it.
      axis_index_groups: groups of indices of `axis_name` that share statistics.
      batch_variance: the estimator that normalizes, "biased" or "unbiased".
      running_variance: the estimator that is tracked.
      virtual_batch_size: normalizes groups of so many examples by statistics of their own, as
        `jaxbn.batch_norm` says.

    Construction further takes `rngs`, the source of the initializers' keys, and the metadata of the
    two parameters, `bias_metadata` and `scale_metadata`, such as names for sharding.

    Raises:
      ValueError, TypeError: an option that is out of its range or does not fit the others.

    Example:
      >>> import jax, jaxbn.nnx
      >>> from flax import nnx
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (64, 16))
      >>> layer = jaxbn.nnx.BatchNorm(16, momentum=0.0, rngs=nnx.Rngs(0))
      >>> y = layer(x)
      >>> print(f"{abs(y.mean()):.1f} {y.std():.1f} {layer.mean[...].mean():.0f}")
      0.0 1.0 3
      >>> layer.eval()
      >>> print(f"{layer(x + 2).mean():.0f} {layer.mean[...].mean():.0f}")
      1 3
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | None = 0.9,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: Hashable | Sequence[Hashable] | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        batch_variance: Estimator = "biased",
        running_variance: Estimator = "unbiased",
        virtual_batch_size: int | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        features = _sizes(num_features, axis)
        if use_running_average is not None:
            _checks.python_bool("use_running_average", use_running_average)
        _checks.momentum(momentum, None, train=False)
        _checks.epsilon(epsilon, False, jnp.dtype(jnp.float32))
        if dtype is not None:
            _checks.floating_dtype("dtype", dtype)
        _checks.axis_index_groups(axis_index_groups, axis_name)
        _checks.estimator("batch_variance", batch_variance)
        _checks.estimator("running_variance", running_variance)
        _checks.virtual_batch_size(virtual_batch_size, features, (), use_batch=False)

        _, initial = init(
            features,
            range(len(features)),
            param_dtype=param_dtype,
            track_count=momentum is None,
        )
        self.mean = nnx.BatchStat(initial["mean"])
        self.var = nnx.BatchStat(initial["var"])
        self.count: nnx.BatchStat[jax.Array] | None = nnx.data(None)
        if "count" in initial:
            self.count = nnx.BatchStat(initial["count"])
        self.scale: nnx.Param[jax.Array] | None = nnx.data(None)
        if use_scale:
            scale = scale_init(rngs.params(), features, param_dtype)
            self.scale = nnx.Param(scale, **scale_metadata)
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), features, param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)

        # What is no variable is part of the graph's definition, which has to be hashable.
        self.num_features = _hashable(num_features)
        self.use_running_average = use_running_average
        self.axis = _hashable(axis)
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = _hashable(axis_name)
        self.axis_index_groups = _hashable(axis_index_groups)
        self.batch_variance: Estimator = batch_variance
        self.running_variance: Estimator = running_variance
        self.virtual_batch_size = virtual_batch_size

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and in training moves the running statistics towards its own.

        Args:
          x: the input, of any floating dtype, with features on `axis`.
          use_running_average: see the attribute, over which it has precedence.
          mask: booleans that broadcast against `x`, True where a value counts. What lies under
            False touches nothing; the output there is `bias`.

        Returns:
          The normalized input, of the shape of `x`.

        Raises:
          ValueError, TypeError: as `jaxbn.batch_norm` does.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                "use_running_average must be True (evaluation) or False (training), got None: give "
                "it to BatchNorm or to the call, or set it with train(), eval() or nnx.view."
            )
        use_running_average = _checks.python_bool("use_running_average", use_running_average)
        x = _checks.floating_array("x", x)
        features = tuple(x.shape[a] for a in _checks.feature_axes(self.axis, x.shape))
        if features != _sizes(self.num_features, self.axis):
            raise ValueError(
                f"x of shape {x.shape} has {features} features on axis={self.axis!r}, where the "
                f"layer was made for num_features={self.num_features!r}."
            )

        params = {"scale": self.scale, "bias": self.bias}
        params = {name: leaf.get_value() for name, leaf in params.items() if leaf is not None}
        stats = {"mean": self.mean, "var": self.var, "count": self.count}
        stats = {name: stat for name, stat in stats.items() if stat is not None}
        y, state = batch_norm(
            params,
            {name: stat.get_value() for name, stat in stats.items()},
            x,
            not use_running_average,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            batch_variance=self.batch_variance,
            running_variance=self.running_variance,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            mask=mask,
            dtype=canonicalize_dtype(x, *params.values(), dtype=self.dtype),
        )
        if not use_running_average:
            for name, stat in stats.items():
                stat.set_value(state[name])
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """What `nnx.view` sets.

        Args:
          use_running_average: see the attribute; None leaves it as it is.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _sizes(num_features: int | Sequence[int], axis: int | Sequence[int]) -> tuple[int, ...]:
    """The size of each feature axis."""
    axes = axis if isinstance(axis, Sequence) else (axis,)
    if not all(isinstance(a, int | np.integer) for a in axes):
        raise ValueError(f"axis must be an integer or a sequence of them, got {axis!r}.")
    given = num_features if isinstance(num_features, Sequence) else (num_features,)
    try:
        sizes = tuple(operator.index(n) for n in given)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 0 or len(sizes) != len(axes):
        raise ValueError(
            f"num_features must be the size of the feature axis, or a sequence with the size of "
            f"each, got {num_features!r} for axis={axis!r}."
        )
    return sizes


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value
