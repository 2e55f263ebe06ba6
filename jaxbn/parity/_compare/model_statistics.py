"""Find the running statistics of two networks, and pair them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxbn.convert._entries import array

if TYPE_CHECKING:
    import torch

MeanAndVar = tuple[np.ndarray, np.ndarray]
# The running mean and variance of each submodule that keeps them, by its path.
StatisticsByPath = dict[str, MeanAndVar]


def of_flax(batch_stats: Mapping[str, Any]) -> StatisticsByPath:
    """Collect the statistics of a Linen model's `batch_stats`."""

    def visit(path: tuple[str, ...], node: Any) -> Iterator[tuple[str, MeanAndVar]]:
        if not isinstance(node, Mapping):
            return
        mean, var = node.get("mean"), node.get("var")
        if hasattr(mean, "shape") and hasattr(var, "shape"):
            yield "/".join(path), (np.asarray(mean), np.asarray(var))
        for name, child in node.items():
            yield from visit((*path, name), child)

    return dict(visit((), batch_stats))


def of_torch(modules: Mapping[str, torch.nn.Module]) -> StatisticsByPath:
    """Collect the statistics of a PyTorch model's modules."""
    found = {}
    for name, module in modules.items():
        mean, var = (getattr(module, f"running_{k}", None) for k in ("mean", "var"))
        if mean is not None and var is not None:
            found[name] = (np.asarray(array(mean)), np.asarray(array(var)))
    return found


def pairs_and_notes(
    ours: StatisticsByPath, theirs: StatisticsByPath, names: Mapping[str, str]
) -> tuple[list[tuple[str, MeanAndVar, MeanAndVar]], list[str]]:
    """Pair the statistics by the submodules' names, and note the ones that no name covers."""
    paired = {k: v for k, v in names.items() if k in ours and v in theirs}
    left_out = [
        f"{framework}'s {sorted(missing)}"
        for framework, missing in (
            ("Flax", ours.keys() - paired.keys()),
            ("PyTorch", theirs.keys() - set(paired.values())),
        )
        if missing
    ]
    pairs = [(name, ours[name], theirs[other]) for name, other in paired.items()]
    if not left_out:
        return pairs, []
    which = "not all" if pairs else "no"
    return pairs, [
        f"{which} running statistics were compared: names has no pair for {' and '.join(left_out)}"
    ]
