"""Arrays from the host's memory, spread over a mesh of devices."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from train_examples.digits.config import UserError

AXIS = "data"


class Batch(NamedTuple):
    """Images, their labels, and a mask that is False over padding."""

    images: ArrayLike
    labels: ArrayLike
    mask: ArrayLike


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh of one axis: the first `devices` of each process, in the processes' order."""
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
    """`batch` with rows that do not count, so that its length is a multiple of a number."""
    missing = -len(np.asarray(batch.mask)) % multiple

    def pad(rows: ArrayLike) -> np.ndarray:
        rows = np.asarray(rows)
        return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])

    return Batch(*map(pad, batch))


def spread(batch: Batch, mesh: Mesh) -> Batch:
    """`batch`, padded, with an equal share of its rows on each device.

    Every process has the whole batch, and puts its own rows alone on its devices.
    """
    return put(padded(batch, mesh.size), NamedSharding(mesh, P(AXIS)))


def replicated(tree: Any, mesh: Mesh) -> Any:
    """`tree`, whole, on every device."""
    return put(tree, NamedSharding(mesh, P()))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """The arrays of `tree`, which every process has alike, as arrays over all processes."""

    def put_leaf(leaf: ArrayLike) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(put_leaf, tree)
