"""ResNet-18 in Flax. Module names are PyTorch's, with `_` in place of the dot before a number."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn
from jaxbn.linen import BatchNorm

Norm = Callable[..., Callable[[jax.Array], jax.Array]]


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a projection if the shape changes."""

    features: int
    strides: int
    norm: Norm | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv_norm = partial(_conv_norm, features=self.features, norm=self.norm)
        y = conv_norm(x, kernel=3, strides=self.strides, names=("conv1", "bn1"))
        y = conv_norm(nn.relu(y), kernel=3, strides=1, names=("conv2", "bn2"))
        if x.shape != y.shape:
            names = ("downsample_0", "downsample_1")
            x = conv_norm(x, kernel=1, strides=self.strides, names=names)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """A network that returns the logits of images, (N, height, width, 3).

    Attributes:
      width: the number of channels of the first stage.
      classes: the number of logits.
      folded: whether the convolutions have biases instead of normalizations after them.
    """

    width: int
    classes: int
    folded: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        norm = None
        if not self.folded:
            norm = partial(BatchNorm, use_running_average=not train, **jaxbn.PYTORCH)
        x = _conv_norm(images, self.width, 7, 2, norm, ("conv1", "bn1"))
        # Flax pads with minus infinity, as PyTorch does. PyTorch pads evenly, unlike "SAME".
        padding: Any = ((1, 1), (1, 1))
        x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), padding)
        for stage in range(4):
            for block in range(2):
                strides = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = Block(self.width * 2**stage, strides, norm, name=name)(x)
        return nn.Dense(self.classes, name="fc")(jnp.mean(x, (1, 2)))


def _conv_norm(
    x: jax.Array,
    features: int,
    kernel: int,
    strides: int,
    norm: Norm | None,
    names: tuple[str, str],
) -> jax.Array:
    """Apply a convolution and its normalization, or a folded convolution if `norm` is None."""
    padding = ((kernel // 2, kernel // 2),) * 2
    conv = partial(nn.Conv, features, (kernel, kernel), strides, padding, name=names[0])
    if norm is None:
        return conv(use_bias=True)(x)
    return norm(name=names[1])(conv(use_bias=False)(x))
