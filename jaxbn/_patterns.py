"""Patterns over the paths of layers, such as "backbone/**"."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any


def as_text(path: Iterable[Any]) -> str:
    """Return the path of a layer as text, as patterns match it."""
    return "/".join(map(str, path))


def matches(pattern: str, path: str) -> bool:
    """Return whether a pattern matches the whole path.

    Args:
      pattern: names separated by "/". In a name, "*" stands for any characters, "?" for one, and
        "[ab]" for one of a choice. The name "**" stands for any number of names, including none.
      path: the path, as `as_text` returns it.
    """
    return _match(pattern.split("/"), path.split("/") if path else [])


def _match(pattern: Sequence[str], names: Sequence[str]) -> bool:
    if not pattern:
        return not names
    first, *rest = pattern
    if first == "**":
        return any(_match(rest, names[skipped:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], first) and _match(rest, names[1:])
