"""Batches as the arguments of a call, and as traced and static arguments of `jax.jit`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Constants(NamedTuple):
    """The part of a batch that is not arrays. It is hashable, as static arguments must be.

    Attributes:
      structure: the batch's tree structure.
      leaves: for each leaf, None if it is an array, and otherwise its type and value. The types
        tell `1` from `True`, which are equal.
    """

    structure: Any
    leaves: tuple[tuple[type, Any] | None, ...]


def split(batch: Any) -> tuple[list[Any], Constants]:
    """Split a batch into its arrays and its constants, such as a Python bool."""
    leaves, structure = jax.tree.flatten(batch)
    constants = (None if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    return arrays, Constants(structure, tuple(constants))


def join(arrays: list[Any], constants: Constants) -> Any:
    """Return the batch with these arrays and constants, the inverse of `split`."""
    remaining = iter(arrays)
    leaves = [next(remaining) if leaf is None else leaf[1] for leaf in constants.leaves]
    return jax.tree.unflatten(constants.structure, leaves)


def arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Return the positional and the keyword arguments that a batch stands for."""
    if isinstance(batch, tuple):
        return batch, {}
    return ((), batch) if isinstance(batch, Mapping) else ((batch,), {})


def _is_array(leaf: Any) -> bool:
    # Arrays of other libraries are traced too: `jax.jit` accepts or rejects them.
    return hasattr(leaf, "dtype") and not isinstance(leaf, np.bool_)
