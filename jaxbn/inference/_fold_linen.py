"""Fold the batch norms of a Linen model, given its variables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxbn import _checks
from jaxbn.inference import _linen_variables, _paths
from jaxbn.inference._check_outputs import Replacement, check_outputs
from jaxbn.inference._folded_entries import folded_entries, magnitudes
from jaxbn.inference._pairs import Pair, cannot_fold, checked_pairs, found_pairs
from jaxbn.inference._trace import check_example, traced_model
from jaxbn.inference._traced_model import TracedModel

Path = str | Sequence[str]
Names = tuple[str, ...]


def fold_linen(
    model_variables: Mapping[str, Any],
    pairs: Mapping[str, Path] | Iterable[tuple[Path, Path]] | None = None,
    *,
    model: Any = None,
    example: Any = None,
    epsilon: float | None = None,
    axis: int | None = None,
    **apply_kwargs: Any,
) -> dict[str, Any]:
    """Fold batch norms into the layers before them, given the variables of a Linen model.

    Each batch norm is folded with `fold`. The new variables are for the same model without those
    batch norms. **In the new model, each layer before one of them must have `use_bias=True`**:
    Linen ignores a bias that no layer reads, and the outputs would be wrong without an error.
    Compare the outputs of the two models once.

    **Pass `model` and `example`.** The model is then run on the example in evaluation mode to find
    the pairs and to read each epsilon and kernel axis from the layers. The following is checked:

    - each batch norm directly follows its layer, with no operation in between, not even a reshape;
    - the layer's output is not used elsewhere, and neither layer nor batch norm is called twice;
    - on the example, each folded layer computes what layer and batch norm computed, up to rounding.
      This check needs values, so it is skipped inside `jax.jit`.

    Without them, `pairs`, `epsilon` and `axis` are used without these checks: with a wrong pair or
    epsilon, the outputs of the folded model are wrong.

    A new bias has the shape (C,) or, in a `ConvLocal`, the shape that its kernel implies. Without a
    model, layers are recognized by the names that Flax gives them. `DenseGeneral` and `Einsum` with
    kernels of more than two axes can be folded only if they have a bias, because their kernels do
    not determine its shape: add a bias of zeros first. The same applies to layers with a name of
    their own whose bias does not have the shape (C,).

    Leaves in boxes of Flax, such as those of `nn.with_partitioning`, stay in their boxes. A new
    bias has no box.

    Args:
      model_variables: the model's variables, with collections `params` and `batch_stats`, as dicts
        or frozen dicts of Flax. They are not changed.
      pairs: a mapping from each layer to the batch norm after it, {"Conv_0": "BatchNorm_0"}, or a
        sequence of such pairs. Deeper paths are "Block_0/Conv_0" or ("Block_0", "Conv_0"). By
        default, with a model, all of its batch norms, which must then be foldable. If some are not,
        pass `find_pairs(model, model_variables, example, ...)`, and keep those in the new model.
      model: the `flax.linen.Module`.
      example: an input of the model, as for `jaxbn.calibrate.recalibrate`: an array, a tuple of
        positional arguments, or a dict of keyword arguments. Pass real data: zeros cannot check
        anything, and are rejected.
      epsilon: the epsilon of all these batch norms. Without a model, the default is 1e-5. If they
        differ, pass the model, or fold them in several calls.
      axis: the output axis of all these kernels. Without a model, the default is -1.
      **apply_kwargs: further arguments of `model.apply`, such as `train=False`.

    Returns:
      New variables, as plain dicts, with folded kernels, and folded or new biases. The entries of
      the batch norms are removed, as are collections and modules that become empty.

    Raises:
      ValueError: a collection is missing; the variables do not have a path, or it is named twice;
        the layer and batch norm of a pair do not fit; `fold` rejects a variance; the shape of a new
        bias is unknown. With a model: a batch norm is in training mode, a check fails, or `epsilon`
        or `axis` differs from that of the layers.
      TypeError: `model_variables` is not a mapping, or `model` is not a Linen module; a kernel,
        bias or statistic has the wrong dtype; neither pairs nor a model are given.

    Example:
      >>> import flax.linen as nn, jax, jaxbn.inference, jaxbn.linen
      >>> model = nn.Sequential([nn.Dense(2, use_bias=False), jaxbn.linen.BatchNorm(True)])
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> variables = model.init(jax.random.key(1), x)
      >>> folded = jaxbn.inference.fold_linen(variables, model=model, example=x)
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
    if model is None and (example is not None or apply_kwargs):
        given = ["example"] * (example is not None) + list(apply_kwargs)
        raise TypeError(f"{', '.join(given)} must come with model, which is called with them.")
    if model is None and pairs is None:
        raise TypeError("pairs must be given, or model and example to find them.")
    variables = _linen_variables.plain_dicts(model_variables)
    paths = None if pairs is None else _parsed(variables, pairs)
    if model is None:
        epsilon, axis = 1e-5 if epsilon is None else epsilon, -1 if axis is None else axis
        kind = _linen_variables.kind_of_name
        chosen = [Pair(layer, norm, epsilon, axis, kind(layer[-1])) for layer, norm in paths or ()]
        return _folded(variables, chosen, None)

    import flax.linen as nn

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a flax.linen.Module, got {type(model).__name__}.")
    check_example(example)
    traced = traced_model(model, variables, example, apply_kwargs)
    if paths is None:
        found, problems = found_pairs(traced)
        if problems:
            advice = (
                " To fold the others and keep these in the model, pass pairs=find_pairs(model, "
                "variables, example, ...)."
            )
            raise cannot_fold(problems, advice if found else "")
        paths = [(pair.layer, pair.norm) for pair in found]
    return _folded(variables, checked_pairs(traced, paths, epsilon, axis), traced)


def _parsed(variables: dict[str, Any], pairs: Any) -> list[tuple[Names, Names]]:
    """Return the paths of the pairs, which the variables must have."""
    paths = _paths.parse_pairs(pairs)
    layers, norms = ([pair[k] for pair in paths] for k in (0, 1))
    kernels = _linen_variables.modules_with(variables["params"], "kernel")
    means = _linen_variables.modules_with(variables["batch_stats"], "mean")
    _paths.check_paths("layers", "a kernel in params", layers, kernels)
    _paths.check_paths("batch norms", "a mean in batch_stats", norms, means)
    return paths


def _folded(
    variables: dict[str, Any], pairs: Sequence[Pair], traced: TracedModel | None
) -> dict[str, Any]:
    """Fold the pairs, in place, and check the result if the model was traced."""
    params, stats = variables["params"], variables["batch_stats"]
    replacements = []
    for pair in pairs:
        module = _linen_variables.module_entries(params, pair.layer)
        # Modules that share the layer's scope have their variables there, too.
        layer = {key: module[key] for key in ("kernel", "bias") if key in module}
        norm = [_linen_variables.module_entries(tree, pair.norm) for tree in (params, stats)]
        try:
            folded = folded_entries(pair, layer, *norm)
            sizes = magnitudes(pair, layer, *norm) if traced else {}
        except (TypeError, ValueError) as error:
            names = _paths.join_paths([pair.layer, pair.norm], " and ")
            raise type(error)(f"{names} cannot be folded: {error}") from None
        module |= folded
        replacements.append(Replacement(pair, folded, sizes))
    if traced is not None:
        check_outputs(traced, replacements)
    for pair in pairs:
        _linen_variables.remove(params, pair.norm)
        _linen_variables.remove(stats, pair.norm)
    if not stats:
        del variables["batch_stats"]
    return variables
