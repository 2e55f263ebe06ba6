"""Match patterns, such as "backbone/**", against the paths of layers."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any


def as_text(path: Iterable[Any]) -> str:
    """Return the path of a layer as text, in the form that patterns match."""
    return "/".join(map(str, path))


def matches(pattern: str, path: str) -> bool:
    """Return whether a pattern matches the whole path.

    Args:
      pattern: names separated by "/". In a name, "*" matches any characters, "?" any single one,
        and "[ab]" one of those listed. The name "**" matches any number of names, including none.
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
