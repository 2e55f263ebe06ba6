"""Handle the names of arrays and of their layers."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def in_natural_order(by_name: Mapping[str, T]) -> dict[str, T]:
    """Sort by name, with numbers in names by value: layer 2 comes before layer 10."""

    def key(name: str) -> list[str | int]:
        # Every second part is a number, so strings are only compared with strings.
        parts = re.split(r"([0-9]+)", name)
        return [int(part) if k % 2 else part for k, part in enumerate(parts)]

    return {name: by_name[name] for name in sorted(by_name, key=key)}


def layer_and_leaf(name: str) -> tuple[str, str]:
    """Split a name such as "bn1.running_mean" or "batch_stats/BatchNorm_0/mean" at the leaf.

    A last component `value`, which Flax's boxes and NNX's variables add, is dropped.
    """
    name = re.sub(r"[./]value$", "", name)
    at = max(name.rfind("."), name.rfind("/"))
    return name[: max(at, 0)], name[at + 1 :]


def printable(text: str) -> str:
    """Escape unprintable characters, since a name in a file could control the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
