"""Deployment: the network folded, timed, exported to a file and read back."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jaxbn.inference import fold_linen
from train_examples.common.errors import UserError
from train_examples.common.timing import alternate, median_ratio
from train_examples.port_efficientnet.flax_model import EfficientNetLite0

# A compiled function from images to logits.
Network = jax.stages.Wrapped


def evaluation(model: EfficientNetLite0, variables: Mapping[str, Any]) -> Network:
    """Return the network in evaluation, with its weights as constants."""
    return jax.jit(lambda images: model.apply(variables, images, train=False))


def folded(model: EfficientNetLite0, variables: Mapping[str, Any], images: np.ndarray) -> Network:
    """Return the network without batch norms, found and checked by running it on images."""
    weights = fold_linen(variables, model=model, example=images, train=False)
    return evaluation(model.clone(folded=True), weights)


def speed_ratio(network: Network, reference: Network, images: np.ndarray) -> float:
    """Return the median ratio of the times of two networks for a batch."""
    batch = jnp.asarray(images)
    return median_ratio(*alternate(partial(network, batch), partial(reference, batch)))


def write(network: Network, image_size: int, path: Path) -> None:
    """Export a network, for batches of any number of images, to a file.

    Raises a `UserError` if the file cannot be written, and then leaves an existing file unchanged.
    """
    shape = export.symbolic_shape(f"batch, {image_size}, {image_size}, 3")
    exported = export.export(network)(jax.ShapeDtypeStruct(shape, jnp.float32))
    partial_file = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial_file.write_bytes(exported.serialize())
            partial_file.replace(path)
        finally:
            partial_file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}.") from None


def read(path: Path) -> Network:
    """Return the network in a file that `write` wrote. Reading it needs JAX alone."""
    return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
