"""Arrays of several processes, and the copies of them that one process computes with."""

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, TypeVar

import jax
import numpy as np

Tree = TypeVar("Tree")


def local_copies(variables: Tree) -> Tree:
    """Return the variables with this process's copy of each array that several processes share."""

    def local(path: Any, leaf: Any) -> Any:
        if not _is_global(leaf):
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        raise ValueError(
            f"variables hold an array that is divided among the processes, at "
            f"{jax.tree_util.keystr(path)} with shape {leaf.shape}, but each process needs all of "
            f"it: replicate the variables first, with jax.device_put(variables, "
            f"NamedSharding(mesh, PartitionSpec()))."
        )

    return jax.tree_util.tree_map_with_path(local, variables)


def shared_like(old: Tree, new: Tree) -> Tree:
    """Return the new variables, shared by the processes where the old ones are.

    Args:
      old: the variables before.
      new: a tree of the same structure, its leaves equal on all processes.
    """

    def shared(old: Any, new: Any) -> Any:
        if not _is_global(old) or _is_global(new):
            return new
        value = np.asarray(new)
        return jax.make_array_from_callback(value.shape, old.sharding, lambda part: value[part])

    return jax.tree.map(shared, old, new)


class LocalBatches:
    """Batches of this process alone."""

    def __init__(self, batches: Iterable[Any]):
        self.batches = batches

    def __length_hint__(self) -> int:
        return length_hint(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            for leaf in jax.tree.leaves(batch):
                if _is_global(leaf):
                    raise ValueError(
                        f"batches must hold this process's part of the data, got an array of "
                        f"shape {leaf.shape} that is divided among processes: leave out "
                        f"processes='together', or give the rows of this process."
                    )
            yield batch


def _is_global(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
