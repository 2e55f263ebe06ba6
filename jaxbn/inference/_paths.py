"""The paths of the pairs that a user passes."""

from collections.abc import Iterable, Mapping
from typing import Any

Path = tuple[str, ...]


def parse_pairs(pairs: Any) -> list[tuple[Path, Path]]:
    """Return the path of each layer and of its batch norm, as tuples of names."""
    wanted = (
        f"pairs must be a mapping such as {{'Conv_0': 'BatchNorm_0'}}, or a sequence of pairs of "
        f"paths, got {pairs!r}."
    )
    if not isinstance(pairs, Iterable):
        raise TypeError(wanted)
    items = list(pairs.items() if isinstance(pairs, Mapping) else pairs)
    if not all(isinstance(item, tuple | list) and len(item) == 2 for item in items):
        raise ValueError(wanted)
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
