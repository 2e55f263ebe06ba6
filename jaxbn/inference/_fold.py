"""Fold one batch norm into the layer before it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn import _call_checks, _checks
from jaxbn._batch_norm import Params, State
from jaxbn._moments import statistics_dtype
from jaxbn._trees import is_box


def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: Params,
    state: State,
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
    r"""Fold a batch norm into the layer before it.

    .. math::

        \mathrm{kernel}' = \mathrm{kernel} \cdot a, \quad
        \mathrm{bias}' = (\mathrm{bias} - \mu) \cdot a + \beta, \quad
        a = \frac{\mathrm{scale}}{\sqrt{\sigma^2 + \epsilon}}

    with the running mean :math:`\mu` and variance :math:`\sigma^2`, and the batch norm's own bias
    :math:`\beta`. In evaluation, the folded layer alone computes what the layer and the batch norm
    computed together, for any strides, padding, dilation or groups. The batch norm must directly
    follow the layer.

    Args:
      kernel: the layer's kernel, of any floating dtype, with its C output features on `axis`.
      bias: the layer's bias, (C,), or None. The layers `DenseGeneral` and `ConvLocal` of Flax have
        biases with more axes, whose shape is kept. A new bias is (C,), so if the layer needs
        another shape, pass zeros.
      params: the batch norm's mapping with `scale` and `bias`, either or both of which may be
        missing. Leaves have the shape (C,), or one that broadcasts, such as (1, C, 1, 1).
      state: the batch norm's mapping with `mean` and `var`, of the same shapes.
      epsilon: the number that the batch norm adds to the variance.
      axis: the kernel's output axis. In Flax, it is the last axis for every layer, depthwise and
        grouped ones too, except for a `ConvTranspose` with `transpose_kernel=True`, where it is -2.
        In PyTorch, it is 0, or 1 for transposed convolutions. Transposed convolutions with groups
        need a `jax.vmap` over the groups, because each group has its own output features.

    Returns:
      The folded kernel and bias, which replace the layer's own when the batch norm is removed.
      Both keep their dtypes, and a new bias has the kernel's; the computation is in float32, or in
      float64 if any array is. Folded values of a float16 kernel may exceed its range: check them.

    Raises:
      ValueError: an argument is out of range or does not fit the others; a variance is negative or
        NaN, or zero if `epsilon` is zero too. Values that `jit` or another transformation traces
        cannot be checked.
      TypeError: an argument has the wrong type or dtype, or is in a box of Flax (`nn.Partitioned`).

    Example:
      >>> import jax, jaxbn, jaxbn.inference
      >>> x, kernel = jax.random.normal(jax.random.key(0), (8, 3)), jax.numpy.ones((3, 2))
      >>> params, state = jaxbn.init((8, 2))
      >>> _, state = jaxbn.batch_norm(params, state, x @ kernel, train=True)
      >>> y, _ = jaxbn.batch_norm(params, state, x @ kernel, train=False)
      >>> kernel, bias = jaxbn.inference.fold(kernel, None, params, state)
      >>> print(jax.numpy.allclose(x @ kernel + bias, y, atol=1e-5))
      True

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018, section 3.2.
    """
    if is_box(kernel):
        raise TypeError(
            f"kernel must be an array, got Flax's box {type(kernel).__name__}: pass "
            f"flax.linen.meta.unbox(kernel), or fold the model's variables with fold_linen."
        )
    kernel = _checks.floating_array("kernel", kernel)
    axis = _output_axis(axis, kernel.shape)
    _checks.mapping("params", params, optional=_checks.PARAMS)
    advice = "; folding needs the running mean and variance"
    _checks.mapping("state", state, _checks.STATISTICS, optional=("count",), advice=advice)

    def feature(name: str, leaf: ArrayLike) -> jax.Array:
        return _feature_leaf(name, leaf, kernel.shape, axis)

    norm = {key: feature(f"params[{key!r}]", leaf) for key, leaf in params.items()}
    norm |= {key: feature(f"state[{key!r}]", state[key]) for key in _checks.STATISTICS}
    layer = {} if bias is None else {"bias": _layer_bias(bias, kernel.shape, axis)}
    bias_shape, bias_dtype = (kernel.shape[axis],), kernel.dtype
    if bias is not None:
        bias_shape, bias_dtype = np.shape(bias), layer["bias"].dtype
    leaves = (kernel, *norm.values(), *layer.values())
    dtype = statistics_dtype(*(leaf.dtype for leaf in leaves))
    _checks.epsilon(epsilon)
    _call_checks.epsilon(epsilon, False, dtype)
    _check_variance(state["var"], epsilon, dtype)
    norm, layer = jax.tree.map(lambda leaf: leaf.astype(dtype), (norm, layer))

    slope = norm.get("scale", 1) / jnp.sqrt(norm["var"] + epsilon)
    new_bias = (layer.get("bias", 0) - norm["mean"]) * slope + norm.get("bias", 0)
    along_axis = tuple(n if a == axis else 1 for a, n in enumerate(kernel.shape))
    new_kernel = kernel.astype(dtype) * slope.reshape(along_axis)
    return new_kernel.astype(kernel.dtype), new_bias.astype(bias_dtype).reshape(bias_shape)


def _output_axis(axis: Any, kernel_shape: tuple[int, ...]) -> int:
    axes = _call_checks.feature_axes(axis, kernel_shape)
    if len(axes) != 1:
        raise ValueError(f"axis must be a single axis of the kernel, got {axis!r}.")
    return axes[0]


def _check_variance(var: Any, epsilon: Any, dtype: jnp.dtype) -> None:
    """Reject a variance that has no inverse square root, if its values are known."""
    if isinstance(var, Tracer) or not getattr(var, "is_fully_addressable", True):
        return
    values = np.asarray(var, np.float64).reshape(-1)
    if not values.size:
        return
    # NumPy's argmin returns the index of the first NaN, if there is one.
    feature = int(np.argmin(values))
    smallest = float(values[feature])
    if not smallest >= 0:
        raise ValueError(
            f"state['var'] must not be negative or NaN, got {smallest:.6g} for feature {feature}. "
            f"If rounding made it negative, clip it: jnp.maximum(state['var'], 0)."
        )
    # Compilers flush numbers below the smallest normal one to zero.
    if not isinstance(epsilon, Tracer) and smallest + float(epsilon) < jnp.finfo(dtype).tiny:
        raise ValueError(
            f"state['var'] must be positive where epsilon={epsilon!r}, got {smallest:.6g} for "
            f"feature {feature}, which would be divided by zero. Pass the epsilon of the batch "
            f"norm."
        )


def _layer_bias(bias: Any, kernel_shape: tuple[int, ...], axis: int) -> jax.Array:
    """Return a layer's bias in the shape (biases per feature, C)."""
    _checks.floating_leaf("bias", bias)
    shape, sizes, features = np.shape(bias), iter(kernel_shape), kernel_shape[axis]
    has_more_axes = (
        axis == len(kernel_shape) - 1
        and len(shape) > 1
        and shape[-1:] == (features,)
        # The shape of the bias is a subsequence of the kernel's.
        and all(size in sizes for size in shape)
    )
    if not has_more_axes:
        return _feature_leaf("bias", bias, kernel_shape, axis)
    return jnp.asarray(bias).reshape(math.prod(shape[:-1]), features)


def _feature_leaf(name: str, leaf: Any, kernel_shape: tuple[int, ...], axis: int) -> jax.Array:
    """Return the leaf in the shape (1, C)."""
    _checks.floating_leaf(name, leaf)
    features = kernel_shape[axis]
    # A leaf broadcasts against the layer's output, whose axes are not those of the kernel.
    if sorted(np.shape(leaf)) != [1] * (np.ndim(leaf) - 1) + [features]:
        raise ValueError(
            f"{name} must have the shape ({features},), or one that broadcasts like "
            f"(1, {features}), for the {features} features on axis {axis} of the kernel, which has "
            f"the shape {kernel_shape}; got {np.shape(leaf)}. If its features are on another axis, "
            f"pass that."
        )
    return jnp.asarray(leaf).reshape(1, features)
