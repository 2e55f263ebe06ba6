"""The pairs of a layer and a batch norm to fold, found in a traced model or given by the user."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.core import Tracer

from jaxbn.inference._placement import Placement, placements
from jaxbn.inference._tags import Path, as_text
from jaxbn.inference._traced_model import TracedModel


class Pair(NamedTuple):
    """A layer and the batch norm that is folded into it.

    Attributes:
      layer, norm: their paths.
      epsilon: the epsilon of the batch norm.
      axis: the output axis of the layer's kernel.
      kind: the class of Flax that the layer is of, or "" if it has a bias of shape (C,).
    """

    layer: Path
    norm: Path
    epsilon: Any
    axis: int
    kind: str


def found_pairs(traced: TracedModel) -> tuple[list[Pair], list[str]]:
    """Return the pairs that can be folded, in the order of the computation.

    The second result says for each of the other batch norms why it cannot be folded.
    """
    pairs, problems = [], []
    for norm, (layer, problem) in placements(traced).items():
        if layer is None or problem is not None:
            problems.append(str(problem))
        else:
            pairs.append(_pair(traced, layer, norm))
    return pairs, problems


def checked_pairs(
    traced: TracedModel, paths: Sequence[tuple[Path, Path]], epsilon: Any, axis: Any
) -> list[Pair]:
    """Return given pairs, if the model runs each batch norm directly after its layer."""
    found = placements(traced)
    pairs = []
    for layer, norm in paths:
        where = found.get(norm, Placement(None, f"model does not call {as_text(norm)}"))
        problem = where.problem
        if problem is None and where.layer not in (None, layer):
            problem = f"{as_text(norm)} directly follows {as_text(where.layer)}"
        if problem is not None:
            raise ValueError(f"{as_text(layer)} and {as_text(norm)} cannot be folded: {problem}.")
        pairs.append(_pair(traced, layer, norm))
    for pair in pairs:
        axes = len(traced.layers[pair.layer].kernel_shape)
        negative = axis - axes if isinstance(axis, int) and 0 <= axis < axes else axis
        if axis is not None and negative != pair.axis:
            what = f"the output axis of the kernel of {as_text(pair.layer)}"
            raise _differs("axis", axis, pair.axis, what)
        # Values that `jit` traces cannot be compared.
        is_known = not isinstance(epsilon, Tracer) and not isinstance(pair.epsilon, Tracer)
        if epsilon is not None and is_known and epsilon != pair.epsilon:
            what = f"the epsilon of {as_text(pair.norm)}"
            raise _differs("epsilon", epsilon, pair.epsilon, what)
    return pairs


def cannot_fold(problems: Sequence[str], advice: str = "") -> ValueError:
    """Return the error for batch norms that cannot be folded."""
    different = list(dict.fromkeys(problems))
    listed = "; ".join(different[:3])
    more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
    count = "a batch norm" if len(problems) == 1 else f"{len(problems)} batch norms"
    return ValueError(f"model has {count} that cannot be folded: {listed}{more}.{advice}")


def _differs(name: str, given: Any, of_layer: Any, what: str) -> ValueError:
    return ValueError(
        f"{name}={given!r} differs from {what}, {of_layer!r}. Leave {name} out: it is read from "
        f"the layers of model."
    )


def _pair(traced: TracedModel, layer: Path, norm: Path) -> Pair:
    facts = traced.layers[layer]
    return Pair(layer, norm, traced.norms[norm].epsilon, facts.kernel_axis, facts.kind)
