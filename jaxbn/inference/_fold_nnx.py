"""Fold the batch norms of an NNX model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jaxbn.inference import _paths
from jaxbn.inference._check_outputs import Replacement, check_outputs
from jaxbn.inference._folded_entries import folded_entries, magnitudes
from jaxbn.inference._pairs import Pair, cannot_fold, checked_pairs, found_pairs
from jaxbn.inference._trace import check_example, traced_model
from jaxbn.inference._traced_model import TracedModel

Model = TypeVar("Model")
Path = str | Sequence[str]


def fold_nnx(
    model: Model,
    example: Any,
    *,
    pairs: Mapping[str, Path] | Iterable[tuple[Path, Path]] | None = None,
    **apply_kwargs: Any,
) -> Model:
    """Return a copy of an NNX model with batch norms folded into the layers before them.

    The model's code need not change. In the copy, each folded batch norm returns its input, in the
    dtype of its former output, and its layer has the folded kernel and bias; a layer without a bias
    gets one. The copy is for evaluation only: in training mode, a folded batch norm raises an
    error.

    The model is run on the example in evaluation mode to find the pairs, as `find_pairs` does, and
    to read each epsilon and kernel axis from the layers. Each folded layer must then compute on the
    example what layer and batch norm computed, up to rounding. This check needs values, so it is
    skipped inside `jax.jit`. Batch norms that cannot be folded, or are not in `pairs`, are
    unchanged.

    Args:
      model: a `flax.nnx.Module` in evaluation mode: call `model.eval()` first. It is not changed.
      example: an input of the model, as for `jaxbn.calibrate.recalibrate`: an array, a tuple of
        positional arguments, or a dict of keyword arguments. Pass real data: zeros cannot check
        anything, and are rejected.
      pairs: a mapping from each layer to the batch norm after it, such as
        {"blocks/0/conv": "blocks/0/norm"}, or a sequence of such pairs, with the paths of
        `nnx.state(model)`. By default, all pairs that can be folded; there must be at least one.
      **apply_kwargs: further arguments of the model.

    Returns:
      The new model.

    Raises:
      TypeError: `model` is not an `nnx.Module`, or `example` holds no arrays.
      ValueError: no batch norm, or not every given pair, can be folded, and the text says why; a
        batch norm is in training mode; `fold` rejects a variance; a folded layer gives a different
        output on the example.

    Example:
      >>> import jax, jaxbn.inference, jaxbn.nnx
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> dense = nnx.Linear(3, 2, use_bias=False, rngs=rngs)
      >>> model = nnx.Sequential(dense, jaxbn.nnx.BatchNorm(2, rngs=rngs), nnx.relu)
      >>> x = 3 + jax.random.normal(jax.random.key(0), (8, 3))
      >>> _ = model(x)  # A training step.
      >>> model.eval()
      >>> folded = jaxbn.inference.fold_nnx(model, x)
      >>> print(nnx.state(folded, nnx.BatchStat))
      State({})
      >>> print(jax.numpy.allclose(folded(x), model(x), atol=1e-5))
      True
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}.")
    check_example(example)
    traced = traced_model(model, None, example, apply_kwargs)
    if pairs is None:
        chosen, problems = found_pairs(traced)
        if not traced.norms:
            raise ValueError("model must call a batch norm, but calls none on example.")
        if not chosen:
            raise cannot_fold(problems)
    else:
        chosen = _checked(traced, pairs)
    new = nnx.clone(model)
    _fold(new, chosen, traced)
    return new


def _checked(traced: TracedModel, pairs: Any) -> list[Pair]:
    paths = _paths.parse_pairs(pairs)
    layers, norms = ([pair[k] for pair in paths] for k in (0, 1))
    having = "a call on example"
    _paths.check_paths("layers", having, layers, list(traced.layers))
    _paths.check_paths("batch norms", having, norms, list(traced.norms))
    return checked_pairs(traced, paths, None, None)


def _fold(model: Any, pairs: Sequence[Pair], traced: TracedModel) -> None:
    """Fold the pairs of a model in place, and check the result."""
    from flax import nnx

    from jaxbn.inference._folded_norm import replace
    from jaxbn.inference._trace_nnx import modules

    nodes = modules(model)
    replacements = []
    for pair in pairs:
        layer, norm = nodes[pair.layer], nodes[pair.norm]
        entries = (
            _values(layer, "kernel", "bias"),
            _values(norm, "scale", "bias"),
            _values(norm, "mean", "var"),
        )
        try:
            folded, sizes = folded_entries(pair, *entries), magnitudes(pair, *entries)
        except (TypeError, ValueError) as error:
            names = _paths.join_paths([pair.layer, pair.norm], " and ")
            raise type(error)(f"{names} cannot be folded: {error}") from None
        replacements.append(Replacement(pair, folded, sizes))
    check_outputs(traced, replacements)
    for pair, folded, _ in replacements:
        layer = nodes[pair.layer]
        layer.kernel.set_value(folded["kernel"])
        if layer.bias is None:
            layer.bias, layer.use_bias = nnx.Param(folded["bias"]), True
        else:
            layer.bias.set_value(folded["bias"])
        replace(nodes[pair.norm], traced.norms[pair.norm].dtype)


def _values(module: Any, *names: str) -> dict[str, Any]:
    variables = {name: getattr(module, name, None) for name in names}
    return {name: value.get_value() for name, value in variables.items() if value is not None}
