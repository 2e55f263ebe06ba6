"""The places of a Flax model's parameters and statistics, in Linen's variables."""

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._trees import is_box
from jaxbn.convert import _entries
from jaxbn.convert._entries import Array

_COLLECTIONS = ("params", "batch_stats")


class Slot(NamedTuple):
    """The place of one array.

    Attributes:
      layer: the path of its layer, "block/conv"; "" if the model is a single layer.
      leaf: its name in the layer, "kernel".
      array: what is there now, an array or only its shape and dtype.
      layout: of a kernel, "transposed" if it belongs to a `ConvTranspose` with
        `transpose_kernel=False`, "plain" if not, and None if that is not known.
    """

    layer: str
    leaf: str
    array: Any
    layout: Literal["plain", "transposed"] | None

    @property
    def path(self) -> str:
        """The path of the array, "block/conv/kernel"."""
        return f"{self.layer}/{self.leaf}" if self.layer else self.leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that an array for this place must have."""
        return tuple(self.array.shape)


Slots = Mapping[Hashable, Slot]


def is_under(path: str, ancestors: Iterable[str], separator: str) -> bool:
    """Return whether a path is one of several, or below one of them."""
    return any(path == a or path.startswith(a + separator) for a in ancestors)


def linen_slots(variables: Any) -> Slots:
    """Return the slots of Linen's variables, by collection and path."""
    _checks.mapping("variables", variables)
    if not any(name in variables for name in _COLLECTIONS):
        raise ValueError(
            f"variables must hold 'params' or 'batch_stats', as model.init returns them, got the "
            f"keys {sorted(map(str, variables))}."
        )
    slots: dict[Hashable, Slot] = {}
    for collection in _COLLECTIONS:
        for path, leaf in _leaves(variables.get(collection, {}), ()):
            (array,) = jax.tree.leaves(leaf)
            layer = "/".join(path[:-1])
            layout = "plain" if re.search(r"(^|/)Conv_\d+$", layer) else None
            slots[(collection, *path)] = Slot(layer, path[-1], array, layout)
    return slots


def to_jax(slots: Slots, values: Mapping[Hashable, Array]) -> dict[Hashable, jax.Array]:
    """Return JAX arrays that share no memory with the given ones."""
    return {
        key: jnp.array(int(v), jnp.int32) if slots[key].leaf == "count" else _entries.to_jax(v)
        for key, v in values.items()
    }


def filled(variables: Mapping[str, Any], values: Mapping[Hashable, jax.Array]) -> dict[str, Any]:
    """Return a copy of Linen's variables, with these arrays in their slots."""

    def copy(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping):
            return {name: copy(child, (*path, name)) for name, child in node.items()}
        if path not in values:
            return node
        return node.replace_boxed(values[path]) if is_box(node) else values[path]

    return copy(variables, ())


def _leaves(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(node, Mapping):
        yield path, node
        return
    for name, child in node.items():
        yield from _leaves(child, (*path, name))
