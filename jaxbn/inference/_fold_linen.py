"""Fold the batch norms of a Linen model, given its variables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxbn import _checks
from jaxbn._trees import is_box
from jaxbn.inference import _linen_variables
from jaxbn.inference._fold import fold

Path = str | Sequence[str]
Entries = Mapping[str, Any]


def fold_linen(
    model_variables: Mapping[str, Any],
    pairs: Mapping[str, Path] | Iterable[tuple[Path, Path]],
    *,
    epsilon: float = 1e-5,
    axis: int = -1,
) -> dict[str, Any]:
    """Fold batch norms into the layers before them, given the variables of a Linen model.

    Each is folded by `fold`. The new variables are for the same model without those batch norms,
    and with biases in the layers before them: `use_bias=True`.

    A new bias has the shape (C,), or in a `ConvLocal` the one that its kernel implies. Layers are
    recognized by the names that Flax gives them. `DenseGeneral` and `Einsum` with kernels of more
    than two axes can be folded only if they have a bias, because their kernels do not determine its
    shape: put zeros there first. The same holds for layers with a name of their own whose bias is
    not (C,).

    Leaves in boxes of Flax, such as those of `nn.with_partitioning`, stay in them. A new bias has
    no box.

    Args:
      model_variables: the model's variables, with collections `params` and `batch_stats`, as dicts
        or frozen dicts of Flax. They are not changed.
      pairs: each layer with the batch norm after it: {"Conv_0": "BatchNorm_0"} or a sequence of
        such pairs. Deeper paths are "Block_0/Conv_0" or ("Block_0", "Conv_0").
      epsilon: the epsilon of all these batch norms. If they differ, fold them in several calls.
      axis: the output axis of all these kernels.

    Returns:
      New variables, as plain dicts, with kernels folded and biases folded or added. The entries of
      the batch norms are removed, and with them collections and modules that become empty.

    Raises:
      ValueError: a collection is missing; the variables do not have a path, or it is named twice;
        the layer and batch norm of a pair do not fit; a variance is one that `fold` rejects; a new
        bias has an unknown shape.
      TypeError: `model_variables` is not a mapping; a kernel, bias or statistic has the wrong
        dtype.

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
    _checks.mapping("model_variables", model_variables)
    if not {"params", "batch_stats"} <= model_variables.keys():
        raise ValueError(
            f"model_variables must have the collections 'params' and 'batch_stats', got "
            f"{sorted(map(str, model_variables))}."
        )
    variables = _linen_variables.plain_dicts(model_variables)
    params, stats = variables["params"], variables["batch_stats"]
    paths = _linen_variables.parse_pairs(pairs)
    layers, norms = ([pair[k] for pair in paths] for k in (0, 1))
    kernels = _linen_variables.modules_with(params, "kernel")
    means = _linen_variables.modules_with(stats, "mean")
    _linen_variables.check_paths("layers", "a kernel in params", layers, kernels)
    _linen_variables.check_paths("batch norms", "a mean in batch_stats", norms, means)

    for layer_path, norm_path in paths:
        layer = _linen_variables.module_entries(params, layer_path)
        norm = [_linen_variables.module_entries(tree, norm_path) for tree in (params, stats)]
        try:
            layer |= _folded_layer(layer_path[-1], layer, *norm, epsilon=epsilon, axis=axis)
        except (TypeError, ValueError) as error:
            names = _linen_variables.join_paths([layer_path, norm_path], " and ")
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
    """Apply `fold` to the entries of a Linen model, which may be in boxes."""
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
