"""Placing arrays from the host's memory on a mesh of devices."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from train_examples.common.errors import UserError

AXIS = "data"


class Batch(NamedTuple):
    """Images, their labels, and a mask that is False for padding."""

    images: ArrayLike
    labels: ArrayLike
    mask: ArrayLike


def data_mesh(devices: int | None = None) -> Mesh:
    """Return a mesh with one axis: the first `devices` of each process, in order of processes."""
    has = jax.local_device_count()
    if devices is not None and devices > has:
        raise UserError(
            f"--devices {devices} is more than the {has} that this process has of the kind "
            f"{jax.local_devices()[0].device_kind}. Only CPU devices can be made, to any number: "
            f"JAX_PLATFORMS=cpu in the environment asks for them."
        )
    chosen = [
        device
        for process in range(jax.process_count())
        for device in jax.local_devices(process)[:devices]
    ]
    return Mesh(np.array(chosen), (AXIS,))


def padded(batch: Batch, multiple: int) -> Batch:
    """Return `batch` with masked-out rows at its end, so that `multiple` divides its length."""
    missing = -len(np.asarray(batch.mask)) % multiple

    def pad(rows: ArrayLike) -> np.ndarray:
        rows = np.asarray(rows)
        return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])

    return Batch(*map(pad, batch))


def spread(batch: Batch, mesh: Mesh) -> Batch:
    """Return `batch`, padded, with an equal share of its rows on each device.

    Every process has the whole batch, and puts only its own rows on its devices.
    """
    return put(padded(batch, mesh.size), NamedSharding(mesh, P(AXIS)))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """Return `tree` with a whole copy on every device."""
    return put(tree, NamedSharding(mesh, P()))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Return `tree`, which is the same in every process, as arrays that span all processes."""

    def put_leaf(leaf: ArrayLike) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put_leaf, tree)
