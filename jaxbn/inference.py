"""Folding into the layer before: what a batch norm does in evaluation, that layer can do alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn import _checks
from jaxbn._batch_norm import Params, State
from jaxbn._moments import statistics_dtype

__all__ = ["fold", "fold_linen"]

Path = str | Sequence[str]


def fold(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    params: Params,
    state: State,
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
    r"""Kernel and bias of the layer that does what a layer and the batch norm after it do.

    .. math::

        \mathrm{kernel}' = \mathrm{kernel} \cdot a, \quad
        \mathrm{bias}' = (\mathrm{bias} - \mu) \cdot a + \beta, \quad
        a = \frac{\mathrm{scale}}{\sqrt{\sigma^2 + \epsilon}}

    with the running mean :math:`\mu` and variance :math:`\sigma^2`, and the batch norm's own bias
    :math:`\beta`. The two compute the same in evaluation, whatever strides, padding, dilation or
    groups the layer has, as long as nothing stands between it and the batch norm.

    Args:
      kernel: the layer's kernel, of any floating dtype, with its C output features on `axis`.
      bias: the layer's bias, (C,); None where it has none.
      params: the batch norm's mapping with `scale` and `bias`, either or both of which may be
        missing. Leaves have the shape (C,), or one that broadcasts, such as (1, C, 1, 1).
      state: the batch norm's mapping with `mean` and `var`, of the same shapes.
      epsilon: the batch norm's, added to the variance.
      axis: the kernel's output axis: the last for every layer of Flax, depthwise and grouped ones
        too, but -2 for a `ConvTranspose` with `transpose_kernel=True`. For PyTorch's kernels 0,
        and 1 for transposed convolutions, which with groups need a `jax.vmap` over them, as
        each group has output features of its own.

    Returns:
      The folded kernel and bias, to be used in place of the old ones with no batch norm after.
      The kernel keeps its dtype and the bias its own, or takes the kernel's where there was none;
      between, all is computed in float32, or float64 where an array is. Of a float16 kernel, see
      that the folded values stay within its range.

    Raises:
      ValueError: an argument that is out of its range or does not fit the others; no `state`.
      TypeError: an argument of the wrong dtype.

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
    kernel = _checks.floating_array("kernel", kernel)
    axis = _output_axis(axis, kernel.shape)
    features = kernel.shape[axis]
    _check_mapping("params", params, required=set(), optional={"scale", "bias"})
    _check_state(state)

    def feature(name: str, leaf: ArrayLike) -> jax.Array:
        return _feature_leaf(name, leaf, kernel.shape, axis)

    norm = {key: feature(f"params[{key!r}]", leaf) for key, leaf in params.items()}
    norm |= {key: feature(f"state[{key!r}]", state[key]) for key in ("mean", "var")}
    layer = {} if bias is None else {"bias": feature("bias", bias)}
    bias_shape, bias_dtype = (features,), kernel.dtype
    if bias is not None:
        bias_shape, bias_dtype = np.shape(bias), layer["bias"].dtype
    leaves = (kernel, *norm.values(), *layer.values())
    dtype = statistics_dtype(*(leaf.dtype for leaf in leaves))
    _checks.epsilon(epsilon, False, dtype)
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
    """The variables of a Linen model without the batch norms that `pairs` names.

    Each pair is folded as by `fold`. What comes back is for the same model without those batch
    norms, and with biases in the layers before them: `use_bias=True`.

    Args:
      model_variables: the model's variables, with collections `params` and `batch_stats`, as dicts
        or as Flax's frozen ones. They stay as they are.
      pairs: which layer comes before which batch norm, {"Conv_0": "BatchNorm_0"} or a sequence of
        such pairs. Deeper paths are "Block_0/Conv_0" or ("Block_0", "Conv_0").
      epsilon: that of all these batch norms. Where they differ, fold them in several calls.
      axis: the output axis of all these kernels.

    Returns:
      New variables, as plain dicts: the layers' kernels folded and their biases folded or added;
      no entries of the batch norms, nor collections or modules that are empty without them.

    Raises:
      ValueError: paths that the variables do not have, or that are named twice; a pair that does
        not fit together.
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
    variables = _plain_dicts(model_variables)
    params, stats = variables["params"], variables["batch_stats"]
    paths = _paths(pairs)
    _check_paths("layers", "a kernel in params", [p for p, _ in paths], _holders(params, "kernel"))
    _check_paths(
        "batch norms", "a mean in batch_stats", [p for _, p in paths], _holders(stats, "mean")
    )

    for layer_path, norm_path in paths:
        layer = _at(params, layer_path)
        try:
            layer["kernel"], layer["bias"] = fold(
                layer["kernel"],
                layer.get("bias"),
                _at(params, norm_path),
                _at(stats, norm_path),
                epsilon=epsilon,
                axis=axis,
            )
        except (TypeError, ValueError) as error:
            names = f"{'/'.join(layer_path)} and {'/'.join(norm_path)}"
            raise type(error)(f"{names} cannot be folded: {error}") from None
    for _, norm_path in paths:
        _remove(params, norm_path)
        _remove(stats, norm_path)
    if not stats:
        del variables["batch_stats"]
    return variables


def _output_axis(axis: Any, kernel_shape: tuple[int, ...]) -> int:
    axes = _checks.feature_axes(axis, kernel_shape)
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


def _feature_leaf(name: str, leaf: Any, kernel_shape: tuple[int, ...], axis: int) -> jax.Array:
    """The leaf in the shape (C,)."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(leaf).__name__ if dtype is None else dtype
        raise TypeError(f"{name} must be an array of a floating dtype, got {got}.")
    features = kernel_shape[axis]
    # A leaf that broadcasts does so against the layer's output, whose axes are not the kernel's.
    if sorted(np.shape(leaf)) != [1] * (np.ndim(leaf) - 1) + [features]:
        raise ValueError(
            f"{name} must have the shape ({features},), or one that broadcasts like "
            f"(1, {features}), for the {features} features on axis {axis} of the kernel, which has "
            f"the shape {kernel_shape}; got {np.shape(leaf)}. If axis is another one, pass it."
        )
    return jnp.asarray(leaf).reshape(features)


def _paths(pairs: Any) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    items = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    if not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        raise ValueError(
            f"pairs must be a mapping such as {{'Conv_0': 'BatchNorm_0'}}, or a sequence of pairs "
            f"of paths, got {pairs!r}."
        )
    return [(_path(layer), _path(norm)) for layer, norm in items]


def _path(path: Any) -> tuple[str, ...]:
    parts = path.split("/") if isinstance(path, str) else path
    is_path = isinstance(parts, tuple | list) and all(isinstance(part, str) for part in parts)
    if not is_path or not parts:
        raise ValueError(
            f"pairs must hold paths like 'Block_0/Conv_0' or ('Block_0', 'Conv_0'), got {path!r}."
        )
    return tuple(parts)


def _check_paths(
    what: str, having: str, paths: list[tuple[str, ...]], known: list[tuple[str, ...]]
) -> None:
    unknown = [path for path in paths if path not in known]
    if unknown:
        raise ValueError(
            f"pairs names {what} without {having}: {_spell(unknown)}; those with one are "
            f"{_spell(known) or 'none'}."
        )
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"pairs names {what} more than once: {_spell(twice)}.")


def _spell(paths: list[tuple[str, ...]]) -> str:
    return ", ".join("/".join(path) for path in paths)


def _plain_dicts(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _plain_dicts(value) for key, value in tree.items()}
    return tree


def _holders(tree: dict[str, Any], leaf: str) -> list[tuple[str, ...]]:
    """The paths of all modules that have a leaf of a name."""
    own = [()] if leaf in tree and not isinstance(tree[leaf], dict) else []
    below = [
        (key, *path)
        for key, value in tree.items()
        if isinstance(value, dict)
        for path in _holders(value, leaf)
    ]
    return own + below


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path:
        tree = tree.get(key, {})
    return tree


def _remove(tree: dict[str, Any], path: tuple[str, ...]) -> None:
    """Removes a module, where it is there, and those around it that have nothing else."""
    key, rest = path[0], path[1:]
    if key not in tree:
        return
    if rest:
        _remove(tree[key], rest)
    if not rest or not tree[key]:
        del tree[key]
