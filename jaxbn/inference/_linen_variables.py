"""Layers and batch norms among the variables of a Linen model, by their paths."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]


def parse_pairs(pairs: Any) -> list[tuple[Path, Path]]:
    """Return the path of each layer and of its batch norm, as tuples of names."""
    items = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    if not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        raise ValueError(
            f"pairs must be a mapping such as {{'Conv_0': 'BatchNorm_0'}}, or a sequence of pairs "
            f"of paths, got {pairs!r}."
        )
    return [(_path(layer), _path(norm)) for layer, norm in items]


def _path(path: Any) -> Path:
    parts = path.split("/") if isinstance(path, str) else path
    is_path = isinstance(parts, tuple | list) and all(isinstance(part, str) for part in parts)
    if not is_path or not parts:
        raise ValueError(
            f"pairs must hold paths like 'Block_0/Conv_0' or ('Block_0', 'Conv_0'), got {path!r}."
        )
    return tuple(parts)


def check_paths(what: str, having: str, paths: list[Path], known: list[Path]) -> None:
    """Reject paths that are not among the known ones, or that are named twice."""
    unknown = [path for path in paths if path not in known]
    if unknown:
        raise ValueError(
            f"pairs names {what} without {having}: {join_paths(unknown)}; those with one are "
            f"{join_paths(known) or 'none'}."
        )
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"pairs names {what} more than once: {join_paths(twice)}.")


def join_paths(paths: list[Path], separator: str = ", ") -> str:
    """Return paths as they are written in an error message."""
    return separator.join("/".join(path) for path in paths)


def plain_dicts(tree: Any) -> Any:
    """Copy nested mappings, such as Flax's frozen ones, into plain dicts."""
    if isinstance(tree, Mapping):
        return {key: plain_dicts(value) for key, value in tree.items()}
    return tree


def modules_with(tree: dict[str, Any], leaf: str) -> list[Path]:
    """Return the paths of all modules that have a leaf of this name."""
    own = [()] if leaf in tree and not isinstance(tree[leaf], dict) else []
    below = [
        (key, *path)
        for key, value in tree.items()
        if isinstance(value, dict)
        for path in modules_with(value, leaf)
    ]
    return own + below


def module_entries(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the entries of a module, or an empty dict if it has none."""
    for key in path:
        tree = tree.get(key, {})
    return tree


def remove(tree: dict[str, Any], path: Path) -> None:
    """Remove a module, if it exists, and the modules around it that become empty."""
    key, rest = path[0], path[1:]
    if key not in tree:
        return
    if rest:
        remove(tree[key], rest)
    if not rest or not tree[key]:
        del tree[key]


def zero_bias(name: str, kernel: Any) -> np.ndarray | None:
    """Return zeros of the shape of a layer's bias, or None if that is (C,), `fold`'s default."""
    kind = re.fullmatch(r"(ConvLocal|DenseGeneral|Einsum)_\d+", name)
    shape = np.shape(kernel)
    if kind is None or len(shape) <= 2:
        return None
    if kind[1] == "ConvLocal":
        return np.zeros((*shape[:-2], shape[-1]), getattr(kernel, "dtype", None))
    raise ValueError(
        f"the layer has no bias, and its kernel of shape {shape} does not determine the shape of "
        f"one. Put a bias of zeros into its params, of the shape that the layer has with "
        f"use_bias=True, and fold that."
    )
