"""Mark the inputs and outputs of layers and batch norms in a traced model."""

import json
from enum import Enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# The names of a module and of those around it.
Path = tuple[str, ...]
# The marks of `checkpoint_name` are identities, which jit, remat and vmap carry along.
_PREFIX = "jaxbn.inference:"


class Place(Enum):
    """What a marked value is to the layer or the batch norm that it is marked for."""

    LAYER_INPUT = "layer input"
    LAYER_OUTPUT = "layer output"
    NORM_INPUT = "norm input"
    NORM_OUTPUT = "norm output"


class Tag(NamedTuple):
    """A mark: the place of a value, and the path of its layer or batch norm."""

    place: Place
    path: Path


def is_floating_array(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.floating)


def tagged(tree: Any, place: Place, path: Path) -> Any:
    """Mark the floating arrays of a tree."""
    name = _PREFIX + json.dumps([place.value, *path])
    return jax.tree.map(
        lambda leaf: checkpoint_name(leaf, name) if is_floating_array(leaf) else leaf, tree
    )


def tag_of(equation: Any) -> Tag | None:
    """Return the mark that an equation of a jaxpr sets, if it sets one."""
    name = equation.params.get("name")
    if equation.primitive.name != "name" or not str(name).startswith(_PREFIX):
        return None
    place, *path = json.loads(name.removeprefix(_PREFIX))
    return Tag(Place(place), tuple(path))


def as_text(path: Path) -> str:
    return "/".join(path) or "the model"
