"""The NNX layer, which holds the parameters and the statistics. It does no arithmetic."""

import operator
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import Initializer, PromoteDtypeFn
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _call_checks, _checks, _layers
from jaxbn._complex import is_complex
from jaxbn._init import init
from jaxbn._running import Estimator


class BatchNorm(nnx.Module):
    """Normalize a batch as `jaxbn.batch_norm` does, in a Flax NNX model.

    A drop-in replacement for `flax.nnx.BatchNorm`: it takes the same arguments with the same
    defaults, and keeps the same variables (`scale` and `bias` are `Param`, `mean` and `var` are
    `BatchStat`), so its checkpoints load. The defaults are Flax's convention, `jaxbn.FLAX`. For a
    model that comes from PyTorch, write `BatchNorm(n, **jaxbn.PYTORCH, rngs=rngs)`.

    These differences from Flax's layer remain. Where `mask` is False the output is `bias` and no
    gradient flows, in training and in evaluation; Flax normalizes masked-out values, and ignores
    the mask in evaluation. A batch in which no value counts leaves the statistics unchanged, and no
    gradient flows into updated statistics. `epsilon=0` in training and a traced
    `use_running_average` are rejected. For complex inputs, the running mean becomes complex; Flax's
    layer drops its imaginary part.

    Attributes:
      num_features: the size of the feature axis, or the sizes of several, in the input's order.
      use_running_average: True in evaluation, where `mean` and `var` are used and not updated;
        False in training. `train()`, `eval()` and `nnx.view` set it, and a call may override it. If
        it is None, every call must give it.
      axis: the feature axis, or axes; every other axis is reduced.
      momentum: the weight of the old value, in [0, 1]; PyTorch's `momentum` is one minus it. None
        averages all batches so far with equal weights, and adds the `BatchStat` `count`. A `mask`
        must then have size 1 along the features, and `running_variance` must be "biased". After
        loading statistics that come without a count, set `count`: from zero, the next batch would
        replace them.
      epsilon: a small number that is added to the variance.
      dtype: the dtype of the result, by default the one that input, parameters and statistics
        promote to.
      param_dtype: the dtype of `scale` and `bias`. `mean` and `var` begin with it too, but with at
        least float32.
      use_bias: whether there is a bias; if not, `bias` is None.
      use_scale: whether there is a scale; if not, `scale` is None.
      bias_init: the initializer of the bias.
      scale_init: the initializer of the scale.
      axis_name: the mapped axis, or axes, that share statistics. Under `jit` with sharded arrays
        none is needed. Construction and evaluation ignore it.
      axis_index_groups: groups of indices of `axis_name` that share statistics.
      use_fast_variance: accepted as in Flax, but has no effect: the variance is always accurate.
      promote_dtype: a function of the tuple `(x, mean, var, scale, bias)` and the keyword `dtype`
        that returns the tuple to compute with. As in Flax, its dtypes determine that of the result.
        Values that it would make less precise are kept, and only the result is rounded.
      batch_variance: the estimator that normalizes, "biased" or "unbiased".
      running_variance: the estimator that is tracked.
      virtual_batch_size: normalizes each group of this many examples, and a smaller last group if
        some are left, with that group's own statistics, as `jaxbn.batch_norm` describes.
      frozen: whether the running statistics are always used and never updated, as in evaluation,
        regardless of `use_running_average`, and so of `train()`. `scale`, `bias` and the input get
        the gradients of evaluation.
      track: whether training updates the running statistics. Without it, training normalizes with
        the statistics of the batch as usual. Use it for further passes over a batch, as in
        sharpness-aware minimization or adversarial training: `nnx.view(model, track=False)` is
        the same model without tracking.

    The constructor also takes `rngs`, the source of the initializers' keys, and `bias_metadata` and
    `scale_metadata`, metadata of the two parameters such as names for sharding.

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
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: Hashable | Sequence[Hashable] | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        batch_variance: Estimator = "biased",
        running_variance: Estimator = "biased",
        virtual_batch_size: int | None = None,
        frozen: bool = False,
        track: bool = True,
    ):
        _checks.function("promote_dtype", promote_dtype)
        # Attributes that are not variables are part of the graph definition, which is hashed.
        self.num_features = hashable(num_features)
        self.use_running_average = use_running_average
        self.axis = hashable(axis)
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = hashable(axis_name)
        self.axis_index_groups = hashable(axis_index_groups)
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.batch_variance: Estimator = batch_variance
        self.running_variance: Estimator = running_variance
        self.virtual_batch_size = virtual_batch_size
        self.frozen = frozen
        self.track = track
        _layers.checked_options(self)
        features = _sizes(num_features, axis)

        _, initial = init(
            features,
            range(len(features)),
            # The mean becomes complex with the first complex batch.
            param_dtype=jnp.finfo(param_dtype).dtype,
            track_count=momentum is None,
        )
        self.mean = nnx.BatchStat(initial["mean"])
        self.var = nnx.BatchStat(initial["var"])
        self.count: nnx.BatchStat[jax.Array] | None = nnx.data(None)
        if "count" in initial:
            self.count = nnx.BatchStat(initial["count"])
        self.scale: nnx.Param[jax.Array] | None = nnx.data(None)
        if use_scale:
            _checks.function("scale_init", scale_init)
            scale = scale_init(rngs.params(), features, param_dtype)
            self.scale = nnx.Param(scale, **scale_metadata)
        self.bias: nnx.Param[jax.Array] | None = nnx.data(None)
        if use_bias:
            _checks.function("bias_init", bias_init)
            bias = bias_init(rngs.params(), features, param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalize `x`. In training, this also moves the running statistics.

        Args:
          x: the input, with features on `axis`. As in Flax, integers and booleans are converted to
            floating numbers.
          use_running_average: see the attribute, over which it takes precedence.
          mask: an array that broadcasts against `x`, True or nonzero where a value counts.
            Masked-out values affect nothing, and the output there is `bias`.

        Returns:
          The normalized input, of the shape of `x`.

        Raises:
          ValueError, TypeError: an argument is invalid, as for `jaxbn.batch_norm`.
        """
        options = _layers.checked_options(self)
        train = not self.frozen and not _given_mode(use_running_average, self.use_running_average)
        shape = _layers.floating_input(x, self.dtype).shape
        features = tuple(shape[a] for a in _call_checks.feature_axes(self.axis, shape))
        if features != _sizes(self.num_features, self.axis):
            raise ValueError(
                f"x of shape {shape} has {features} features on axis={self.axis!r}, where the "
                f"layer was made for num_features={self.num_features!r}."
            )

        stats = {"mean": self.mean, "var": self.var, "count": self.count}
        stats = {name: stat for name, stat in stats.items() if stat is not None}
        state = {name: stat.get_value() for name, stat in stats.items()}
        scale = None if self.scale is None else self.scale.get_value()
        bias = None if self.bias is None else self.bias.get_value()

        (x, mean, var, scale, bias), dtype = promoted(
            self, x, state["mean"], state["var"], scale, bias
        )
        if not train:
            state = {"mean": mean, "var": var}
        params = {k: v for k, v in {"scale": scale, "bias": bias}.items() if v is not None}
        options |= {"mask": _layers.boolean_mask(mask), "dtype": dtype}
        y, state = _layers.function_of(self)(params, state, x, train, **options)
        if train and self.track:
            for name, stat in stats.items():
                stat.set_value(state[name])
        return y

    def set_view(
        self,
        use_running_average: bool | None = None,
        frozen: bool | None = None,
        track: bool | None = None,
    ) -> None:
        """Set the options that `nnx.view` passes.

        Args:
          use_running_average: see the attribute; None leaves it unchanged.
          frozen: see the attribute; None leaves it unchanged.
          track: see the attribute; None leaves it unchanged.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if frozen is not None:
            self.frozen = frozen
        if track is not None:
            self.track = track


def _given_mode(of_call: bool | None, of_layer: bool | None) -> bool:
    """Return the `use_running_average` of a call or, without one, of its layer."""
    use_running_average = of_layer if of_call is None else of_call
    if use_running_average is None:
        raise ValueError(
            "use_running_average must be True (evaluation) or False (training), got None: give "
            "it to BatchNorm or to the call, or set it with train(), eval() or nnx.view."
        )
    return _checks.python_bool("use_running_average", use_running_average)


def promoted(
    layer: Any, x: ArrayLike, *others: jax.Array | None
) -> tuple[tuple[Any, ...], jnp.dtype]:
    """Return the arrays that a layer, this one or Flax's, computes with, and its output's dtype.

    Args:
      layer: the layer, with its `dtype` and its `promote_dtype`.
      x: the input.
      *others: `mean`, `var`, `scale` and `bias`; the last two may be None.
    """
    result = layer.promote_dtype((x, *others), dtype=layer.dtype)
    dtype = canonicalize_dtype(result[0], *result[3:], dtype=layer.dtype)
    given = (_layers.floating_input(x, layer.dtype), *others)
    return tuple(map(_unless_narrower, result, given)), jnp.dtype(dtype)


def _unless_narrower(new: Any, old: Any) -> Any:
    """Return `new`, or `old` if `new` has less precision, as only the result is to be rounded."""
    if old is None:
        return new
    if is_complex(new) and not is_complex(old):
        # All arrays were promoted to one dtype, but a variance is real.
        new = jnp.real(new)
    # Nothing is promoted here, so that JAX's strict promotion does not object.
    with jax.numpy_dtype_promotion("standard"):
        return new if jnp.promote_types(new.dtype, old.dtype) == new.dtype else old


def _sizes(num_features: int | Sequence[int], axis: int | Sequence[int]) -> tuple[int, ...]:
    """Return the size of each feature axis."""
    axes = _checks.axis(axis)
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


def hashable(value: Any) -> Any:
    return tuple(hashable(v) for v in value) if isinstance(value, list | tuple) else value
