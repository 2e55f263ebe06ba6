"""Deployment: fold normalizations into the convolutions, and export the network to a file."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import export

from jaxbn.inference import fold_linen
from train_examples.common.errors import UserError
from train_examples.port_resnet.flax_model import ResNet18

# A compiled function from images to logits.
Network = jax.stages.Wrapped


def pairs(variables: Mapping[str, Any]) -> dict[str, str]:
    """Return the path of the batch norm after each convolution, by the path of the convolution."""
    norms = {"/".join(path[:-1]) for path in flatten_dict(variables["batch_stats"])}

    def conv(norm: str) -> str:
        return norm.replace("bn", "conv").replace("downsample_1", "downsample_0")

    return {conv(norm): norm for norm in sorted(norms)}


def folded(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of the network that is built with `folded=True`."""
    return fold_linen(variables, pairs(variables))


def evaluation(model: ResNet18, variables: Mapping[str, Any]) -> Network:
    """Return the compiled network in evaluation, with its weights as constants."""
    return jax.jit(lambda images: model.apply(variables, images, False))


def write(network: Network, image_size: int, path: Path) -> None:
    """Export a network, for batches of any size, to a file.

    Raises a `UserError` if the file cannot be written, and then leaves an existing file unchanged.
    """
    shape = export.symbolic_shape(f"batch, {image_size}, {image_size}, 3")
    exported = export.export(network)(jax.ShapeDtypeStruct(shape, jnp.float32))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(exported.serialize())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}.") from None


def read(path: Path) -> Network:
    """Return the network in a file that `write` wrote. Reading it needs JAX alone."""
    return jax.jit(export.deserialize(bytearray(path.read_bytes())).call)


def milliseconds(network: Network, images: np.ndarray, repeats: int = 10) -> float:
    """Return the shortest time of several calls, without the compilation."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        network(images).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])
