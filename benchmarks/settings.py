"""The settings of all benchmarks."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple


def silently(things: Iterable[Any], description: str) -> Iterable[Any]:
    """Iterate without showing progress."""
    del description
    return things


class Settings(NamedTuple):
    quick: bool = False
    data: tuple[str, ...] = ("settled",)  # keys of `speed.DATA`
    track: Callable[[Iterable[Any], str], Iterable[Any]] = silently  # shows progress
    out: Path | None = None  # the folder of the results
