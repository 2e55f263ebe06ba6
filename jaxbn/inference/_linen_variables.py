"""Layers and batch norms among the variables of a Linen model, by their paths."""

import re
from collections.abc import Mapping
from typing import Any

from jaxbn.inference._paths import Path


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


def kind_of_name(name: str) -> str:
    """Return the class of Flax that a name such as "ConvLocal_0" tells, or ""."""
    kind = re.fullmatch(r"([A-Za-z]+)_\d+", name)
    return kind[1] if kind else ""
