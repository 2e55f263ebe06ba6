"""Layers of PyTorch, Linen and NNX that compute the same once their weights are loaded."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

# Both sum about a hundred products of order one; eps of float64 is 2e-16.
TOLERANCE = 1e-12


class Case(NamedTuple):
    """A layer in PyTorch, Linen and NNX.

    Attributes:
      torch: the layer.
      linen: the module.
      nnx: makes the layer from an `nnx.Rngs`.
      shape: the shape of PyTorch's input, with features on axis 1.
      transpose_kernel: the option of a transposed convolution, which no name shows.
    """

    torch: Callable[[], Any]
    linen: Any
    nnx: Callable[[Any], Any]
    shape: tuple[int, ...]
    transpose_kernel: bool | None = None


def conv(rank: int, inputs: int, outputs: int, groups: int = 1) -> Case:
    window = (3, 2, 4)[:rank]
    padding = [(1, 1), (0, 0), (2, 2)][:rank]
    options: dict[str, Any] = {"padding": padding, "strides": 2, "feature_group_count": groups}
    theirs = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[rank - 1]
    return Case(
        lambda: theirs(inputs, outputs, window, 2, (1, 0, 2)[:rank], groups=groups),
        nn.Conv(outputs, window, **options),
        lambda rngs: nnx.Conv(inputs, outputs, window, **options, rngs=rngs),
        (2, inputs, 7, 6, 8)[: rank + 2],
    )


def conv_transpose(rank: int, inputs: int, outputs: int, transpose_kernel: bool) -> Case:
    window, theirs_padding = (3, 2, 4)[:rank], (1, 0, 2)[:rank]
    # Flax pads the dilated input.
    padding = [(k - 1 - p,) * 2 for k, p in zip(window, theirs_padding, strict=True)]
    options: dict[str, Any] = {"padding": padding, "strides": (2,) * rank}
    options["transpose_kernel"] = transpose_kernel
    theirs = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
    return Case(
        lambda: theirs[rank - 1](inputs, outputs, window, 2, theirs_padding),
        nn.ConvTranspose(outputs, window, **options),
        lambda rngs: nnx.ConvTranspose(inputs, outputs, window, **options, rngs=rngs),
        (2, inputs, 5, 6, 4)[: rank + 2],
        transpose_kernel,
    )


CASES = {
    "conv1d": conv(1, 3, 4),
    "conv2d": conv(2, 3, 4),
    "conv3d": conv(3, 3, 4),
    "square conv": conv(2, 4, 4),
    "grouped": conv(2, 4, 6, groups=2),
    "depthwise": conv(2, 4, 8, groups=4),
    "transposed 1d": conv_transpose(1, 4, 4, False),
    "transposed 2d": conv_transpose(2, 3, 4, False),
    "transposed 3d": conv_transpose(3, 4, 4, False),
    "square transposed": conv_transpose(2, 4, 4, False),
    "transposed kernel": conv_transpose(2, 3, 4, True),
    "square transposed kernel": conv_transpose(2, 4, 4, True),
    "linear": Case(
        lambda: torch.nn.Linear(4, 3), nn.Dense(3), lambda r: nnx.Linear(4, 3, rngs=r), (5, 4)
    ),
    "square linear": Case(
        lambda: torch.nn.Linear(4, 4), nn.Dense(4), lambda r: nnx.Linear(4, 4, rngs=r), (5, 4)
    ),
    "conv as dense": Case(
        lambda: torch.nn.Conv2d(4, 3, 1),
        nn.Dense(3),
        lambda r: nnx.Linear(4, 3, rngs=r),
        (2, 4, 5, 6),
    ),
    "layer norm": Case(
        lambda: torch.nn.LayerNorm(4),
        nn.LayerNorm(epsilon=1e-5),
        lambda r: nnx.LayerNorm(4, epsilon=1e-5, rngs=r),
        (5, 4),
    ),
    "group norm": Case(
        lambda: torch.nn.GroupNorm(2, 4),
        nn.GroupNorm(2, epsilon=1e-5),
        lambda r: nnx.GroupNorm(4, 2, epsilon=1e-5, rngs=r),
        (3, 4, 5, 6),
    ),
    "batch norm": Case(
        lambda: torch.nn.BatchNorm2d(4),
        nn.BatchNorm(use_running_average=True),
        lambda r: nnx.BatchNorm(4, use_running_average=True, rngs=r),
        (3, 4, 5, 6),
    ),
    "prelu": Case(
        lambda: torch.nn.PReLU(), nn.PReLU(), lambda r: nnx.PReLU(param_dtype=jnp.float32), (5, 4)
    ),
}


def with_random_weights(module: Any, seed: int = 0) -> Any:
    """Return a PyTorch module in float64 and evaluation, in which no two values are equal."""
    rng = np.random.default_rng(seed)
    for value in module.double().state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.tensor(rng.uniform(0.5, 1.5, value.shape)))
    return module.eval()


def run_torch(module: Any, x: np.ndarray) -> np.ndarray:
    """Return a PyTorch module's output for an input in its layout, features last."""
    with torch.no_grad():
        return features_last(module(torch.tensor(x)).numpy())


def features_last(x: np.ndarray) -> np.ndarray:
    """Return an array whose features lie on axis 1 in Flax's layout."""
    return np.moveaxis(x, 1, -1)


def random_input(shape: tuple[int, ...]) -> np.ndarray:
    """Return a float64 input."""
    return np.random.default_rng(1).normal(size=shape)
