"""The same network in Flax. Each module has PyTorch's name, with `_` before a number for a dot."""

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
    """Two convolutions of 3 x 3 beside a shortcut, which is a projection where shapes change."""

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
    """Logits of images, (N, height, width, 3).

    Attributes:
      width: the number of channels of the first stage.
      classes: the number of logits.
      folded: whether the convolutions have biases in place of the normalizations after them.
    """

    width: int
    classes: int
    folded: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        norm = partial(BatchNorm, use_running_average=not train, **jaxbn.PYTORCH)
        norm = None if self.folded else norm
        x = _conv_norm(images, self.width, 7, 2, norm, ("conv1", "bn1"))
        # Padded with minus infinity, as in PyTorch; PyTorch pads evenly where "SAME" does not.
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
    padding = ((kernel // 2, kernel // 2),) * 2
    conv = partial(nn.Conv, features, (kernel, kernel), strides, padding, name=names[0])
    if norm is None:
        return conv(use_bias=True)(x)
    return norm(name=names[1])(conv(use_bias=False)(x))
