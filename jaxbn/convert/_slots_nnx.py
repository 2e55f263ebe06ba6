"""The places of a Flax model's parameters and statistics, in an NNX module."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import jax
from flax import nnx

from jaxbn._patterns import as_text
from jaxbn.convert._slot_checks import check_names
from jaxbn.convert._slots import Slot, Slots


def nnx_slots(model: Any) -> tuple[Slots, dict[Hashable, Any]]:
    """Return the slots of an NNX module, and the variable of each, by path.

    A shared layer or variable has its first path, as in `nnx.state(model)`; see `first_path`.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}.")
    nodes = dict(nnx.iter_graph(model))
    variables: dict[Any, Any] = {
        path: node for path, node in nodes.items() if isinstance(node, nnx.Param | nnx.BatchStat)
    }
    slots = {}
    for path, variable in variables.items():
        layer, leaf = as_text(path[:-1]), str(path[-1])
        value = variable.get_value()
        layout = _layout(nodes.get(path[:-1]))
        slots[path] = Slot(layer, leaf, value, layout)
    return slots, variables


def first_path(model: nnx.Module) -> Callable[[str], str]:
    """Return a function from any path of a shared layer to its first path."""
    firsts = {}
    for paths in nnx.find_duplicates(model):
        first, *others = map(as_text, paths)
        firsts |= dict.fromkeys(others, first)

    def resolve(path: str) -> str:
        for other, first in firsts.items():
            if path == other or path.startswith(f"{other}/"):
                return resolve(first + path.removeprefix(other))
        return path

    return resolve


def with_first_paths(model: nnx.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Return names with the first path of each shared layer."""
    check_names(names)
    resolve = first_path(model)
    resolved: dict[str, str] = {}
    for path, name in names.items():
        if resolved.setdefault(resolve(path), name) != name:
            raise ValueError(
                f"names has {path!r}: {name!r}, but that layer is shared, and also has the name "
                f"{resolved[resolve(path)]!r}."
            )
    return resolved


def fill(variables: Mapping[Hashable, Any], values: Mapping[Hashable, jax.Array]) -> None:
    """Put arrays into the variables of an NNX module."""
    for path, value in values.items():
        variables[path].set_value(value)


def _layout(layer: Any) -> Literal["plain", "transposed"]:
    is_transposed = isinstance(layer, nnx.ConvTranspose) and not layer.transpose_kernel
    return "transposed" if is_transposed else "plain"
