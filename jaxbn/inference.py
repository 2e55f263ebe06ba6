"""Fold batch norms into the layers before them, for inference."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn import _call_checks, _checks, _linen_variables
from jaxbn._batch_norm import Params, State
from jaxbn._linen_variables import is_box
from jaxbn._moments import statistics_dtype

__all__ = ["fold", "fold_linen"]

Path = str | Sequence[str]
Entries = Mapping[str, Any]


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
    :math:`\beta`. In evaluation, the folded layer computes what the layer and the batch norm did,
    whatever its strides, padding, dilation or groups, if the batch norm directly follows it.

    Args:
      kernel: the layer's kernel, of any floating dtype, with its C output features on `axis`.
      bias: the layer's bias, (C,); None where it has none. Biases with more axes, which the layers
        `DenseGeneral` and `ConvLocal` of Flax have, are folded in their shape; without one, the new
        bias is (C,), so pass zeros where the layer wants another shape.
      params: the batch norm's mapping with `scale` and `bias`, either or both of which may be
        missing. Leaves have the shape (C,), or one that broadcasts, such as (1, C, 1, 1).
      state: the batch norm's mapping with `mean` and `var`, of the same shapes.
      epsilon: the batch norm's, added to the variance.
      axis: the kernel's output axis: the last for every layer of Flax, depthwise and grouped ones
        too, but -2 for a `ConvTranspose` with `transpose_kernel=True`. For PyTorch's kernels 0,
        and 1 for transposed convolutions, which with groups need a `jax.vmap` over them, as
        each group has output features of its own.

    Returns:
      The folded kernel and bias, which replace the layer's own when the batch norm is removed.
      Both keep their dtypes, and a new bias has the kernel's; the computation is in float32, or in
      float64 where an array is. Folded values of a float16 kernel may exceed its range: check them.

    Raises:
      ValueError: an argument that is out of its range or does not fit the others; no `state`; a
        variance that is negative or NaN, or zero where `epsilon` is zero too. Values that `jit` or
        another transformation traces cannot be checked.
      TypeError: an argument of the wrong dtype, or in one of Flax's boxes (`nn.Partitioned`).

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
            f"kernel must be an array, got a box of Flax's, {type(kernel).__name__}: pass "
            f"flax.linen.meta.unbox(kernel), or fold the model's variables with fold_linen."
        )
    kernel = _checks.floating_array("kernel", kernel)
    axis = _output_axis(axis, kernel.shape)
    _check_mapping("params", params, required=set(), optional={"scale", "bias"})
    _check_state(state)

    def feature(name: str, leaf: ArrayLike) -> jax.Array:
        return _feature_leaf(name, leaf, kernel.shape, axis)

    norm = {key: feature(f"params[{key!r}]", leaf) for key, leaf in params.items()}
    norm |= {key: feature(f"state[{key!r}]", state[key]) for key in ("mean", "var")}
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


def fold_linen(
    model_variables: Mapping[str, Any],
    pairs: Mapping[str, Path] | Iterable[tuple[Path, Path]],
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> dict[str, Any]:
    """Fold the batch norms that `pairs` names into the layers before them, by `fold`.

    The new variables are for the same model without those batch norms, and with biases in the
    layers before them: `use_bias=True`.

    A new bias has the shape (C,), or that of a `ConvLocal`, which the kernel tells; both are known
    by the names that Flax gives. `DenseGeneral` and `Einsum` with kernels of more than two axes
    need a bias to be folded, as their kernels do not tell its shape: put zeros there first. So does
    any layer under a name of its own whose bias is not (C,).

    Leaves in boxes of Flax's, such as those of `nn.with_partitioning`, stay in them. A new bias has
    no box.

    Args:
      model_variables: the model's variables, with collections `params` and `batch_stats`, as dicts
        or as Flax's frozen ones. They are not changed.
      pairs: which layer comes before which batch norm, {"Conv_0": "BatchNorm_0"} or a sequence of
        such pairs. Deeper paths are "Block_0/Conv_0" or ("Block_0", "Conv_0").
      epsilon: that of all these batch norms. Where they differ, fold them in several calls.
      axis: the output axis of all these kernels.

    Returns:
      New variables, as plain dicts: the layers' kernels folded and their biases folded or added;
      no entries of the batch norms, nor collections or modules that are empty without them.

    Raises:
      ValueError: paths that the variables do not have, or that are named twice; a pair that does
        not fit together; a variance that `fold` refuses; a new bias of unknown shape.
      TypeError: a kernel, bias or statistic of the wrong dtype.

    Example:
      >>> import flax.linen as nn, jax, jaxbn.inference, jaxbn.linen
      >>> model = nn.Sequential([nn.Dense(2, use_bias=False), jaxbn.linen.BatchNorm(True)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> variables = model.init(jax.random.key(1), x)
      >>> folded = jaxbn.inference.fold_linen(variables, {"layers_0": "layers_1"})
      >>> jax.tree.map(lambda leaf: leaf.shape, folded)
      {'params': {'layers_0': {'bias': (2,), 'kernel': (3, 2)}}}
      >>> y = nn.Sequential([nn.Dense(2)]).apply(folded, x)
      >>> print(jax.numpy.allclose(y, model.apply(variables, x), atol=1e-5))
      True
    """
    is_mapping = isinstance(model_variables, Mapping)
    if not is_mapping or not {"params", "batch_stats"} <= model_variables.keys():
        got = sorted(map(str, model_variables)) if is_mapping else type(model_variables).__name__
        raise ValueError(
            f"model_variables must have the collections 'params' and 'batch_stats', got {got}."
        )
    variables = _linen_variables.plain_dicts(model_variables)
    params, stats = variables["params"], variables["batch_stats"]
    paths = _linen_variables.paths(pairs)
    layers, norms = ([pair[k] for pair in paths] for k in (0, 1))
    kernels = _linen_variables.holders(params, "kernel")
    means = _linen_variables.holders(stats, "mean")
    _linen_variables.check_paths("layers", "a kernel in params", layers, kernels)
    _linen_variables.check_paths("batch norms", "a mean in batch_stats", norms, means)

    for layer_path, norm_path in paths:
        layer = _linen_variables.at(params, layer_path)
        norm = [_linen_variables.at(tree, norm_path) for tree in (params, stats)]
        try:
            layer |= _folded_layer(layer_path[-1], layer, *norm, epsilon=epsilon, axis=axis)
        except (TypeError, ValueError) as error:
            names = _linen_variables.spell([layer_path, norm_path], " and ")
            raise type(error)(f"{names} cannot be folded: {error}") from None
    for _, norm_path in paths:
        _linen_variables.remove(params, norm_path)
        _linen_variables.remove(stats, norm_path)
    if not stats:
        del variables["batch_stats"]
    return variables


def _folded_layer(
    name: str, layer: Entries, params: Entries, state: Entries, *, epsilon: float, axis: int
) -> dict[str, Any]:
    """`fold` for entries of a Linen model, which may be in boxes."""
    plain, params, state = (
        {key: leaf.unbox() if is_box(leaf) else leaf for key, leaf in entries.items()}
        for entries in (layer, params, state)
    )
    if "bias" not in plain:
        plain["bias"] = _linen_variables.zero_bias(name, plain["kernel"])
    folded = fold(plain["kernel"], plain["bias"], params, state, epsilon=epsilon, axis=axis)
    return {
        key: layer[key].replace_boxed(leaf) if is_box(layer.get(key)) else leaf
        for key, leaf in zip(("kernel", "bias"), folded, strict=True)
    }


def _output_axis(axis: Any, kernel_shape: tuple[int, ...]) -> int:
    axes = _call_checks.feature_axes(axis, kernel_shape)
    if len(axes) != 1:
        raise ValueError(f"axis must be one axis, that of the kernel's features, got {axis!r}.")
    return axes[0]


def _check_mapping(name: str, value: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a mapping, got {type(value).__name__}.")
    if not required <= value.keys() <= required | optional:
        must = f"must have the keys {sorted(required)} and may have" if required else "may have"
        raise ValueError(
            f"{name} {must} the keys {sorted(optional)}; got {sorted(map(str, value))}."
        )


def _check_state(state: Any) -> None:
    if state is None:
        raise ValueError(
            "state must be a mapping with 'mean' and 'var', got None: a batch norm without running "
            "statistics differs from batch to batch, which no kernel does."
        )
    _check_mapping("state", state, required={"mean", "var"}, optional={"count"})


def _check_variance(var: Any, epsilon: Any, dtype: jnp.dtype) -> None:
    """Refuse a variance that has no inverse square root, where its values are known."""
    if isinstance(var, Tracer) or not getattr(var, "is_fully_addressable", True):
        return
    values = np.asarray(var, np.float64).reshape(-1)
    if not values.size:
        return
    # NumPy's argmin is the first NaN, where there is one.
    feature = int(np.argmin(values))
    smallest = float(values[feature])
    if not smallest >= 0:
        raise ValueError(
            f"state['var'] must hold variances, none of them negative or NaN, got {smallest:.6g} "
            f"for feature {feature}. Where rounding made it negative, clip it: "
            f"jnp.maximum(state['var'], 0)."
        )
    # Compilers flush what is below the smallest normal number to zero.
    if not isinstance(epsilon, Tracer) and smallest + float(epsilon) < jnp.finfo(dtype).tiny:
        raise ValueError(
            f"state['var'] must be positive where epsilon={epsilon!r}, got {smallest:.6g} for "
            f"feature {feature}, which would be divided by zero. Pass the epsilon of the batch "
            f"norm."
        )


def _layer_bias(bias: Any, kernel_shape: tuple[int, ...], axis: int) -> jax.Array:
    """Return a layer's bias in the shape (number of biases of each feature, C)."""
    _check_floating("bias", bias)
    shape, sizes, features = np.shape(bias), iter(kernel_shape), kernel_shape[axis]
    has_more_axes = (
        axis == len(kernel_shape) - 1
        and len(shape) > 1
        and shape[-1:] == (features,)
        # The sizes of the bias are among the kernel's, in its order.
        and all(size in sizes for size in shape)
    )
    if not has_more_axes:
        return _feature_leaf("bias", bias, kernel_shape, axis)
    return jnp.asarray(bias).reshape(math.prod(shape[:-1]), features)


def _check_floating(name: str, leaf: Any) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(leaf).__name__ if dtype is None else dtype
        raise TypeError(f"{name} must be an array of a floating dtype, got {got}.")


def _feature_leaf(name: str, leaf: Any, kernel_shape: tuple[int, ...], axis: int) -> jax.Array:
    """Return the leaf in the shape (1, C)."""
    _check_floating(name, leaf)
    features = kernel_shape[axis]
    # A leaf that broadcasts does so against the layer's output, whose axes are not the kernel's.
    if sorted(np.shape(leaf)) != [1] * (np.ndim(leaf) - 1) + [features]:
        raise ValueError(
            f"{name} must have the shape ({features},), or one that broadcasts like "
            f"(1, {features}), for the {features} features on axis {axis} of the kernel, which has "
            f"the shape {kernel_shape}; got {np.shape(leaf)}. If axis is another one, pass it."
        )
    return jnp.asarray(leaf).reshape(1, features)
