"""EfficientNet-Lite0 in Flax, with batch norms or folded."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxbn.linen import BatchNorm

CLASSES = 1000


class Stage(NamedTuple):
    """Blocks of one kind; only the first of them has the stride and changes the features."""

    blocks: int
    kernel: int
    strides: int
    expansion: int
    features: int


# Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", 2019,
# table 1. The Lite variant has ReLU6, and no squeeze-and-excitation.
STAGES = (
    Stage(1, kernel=3, strides=1, expansion=1, features=16),
    Stage(2, kernel=3, strides=2, expansion=6, features=24),
    Stage(2, kernel=5, strides=2, expansion=6, features=40),
    Stage(3, kernel=3, strides=2, expansion=6, features=80),
    Stage(3, kernel=5, strides=1, expansion=6, features=112),
    Stage(4, kernel=5, strides=2, expansion=6, features=192),
    Stage(1, kernel=3, strides=1, expansion=6, features=320),
)
STEM, HEAD = 32, 1280


class ConvNorm(nn.Module):
    """A convolution and its batch norm, or a folded convolution, which has a bias.

    Padding is TensorFlow's "SAME", which the weights were trained with.
    """

    features: int
    kernel: int
    folded: bool
    strides: int = 1
    depthwise: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            self.strides,
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=self.folded,
            name="conv",
        )(x)
        if self.folded:
            return x
        # What `identify` finds for the layers of the PyTorch network.
        norm = BatchNorm(momentum=0.99, epsilon=1e-3, running_variance="unbiased", name="norm")
        return norm(x, use_running_average=not train)


class Block(nn.Module):
    """An inverted residual block (Sandler et al., "MobileNetV2", 2018)."""

    stage: Stage
    strides: int
    folded: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        stage, width, y = self.stage, x.shape[-1] * self.stage.expansion, x
        conv_norm = partial(ConvNorm, folded=self.folded)
        if stage.expansion > 1:
            y = nn.relu6(conv_norm(width, 1, name="expand")(y, train))
        depthwise = conv_norm(
            width, stage.kernel, strides=self.strides, depthwise=True, name="depthwise"
        )
        y = nn.relu6(depthwise(y, train))
        y = conv_norm(stage.features, 1, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """A network that returns the logits of images, (N, height, width, 3).

    Attributes:
      stages: how many of the stages it has.
      folded: whether the convolutions have biases instead of batch norms after them.
    """

    stages: int = len(STAGES)
    folded: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        conv_norm = partial(ConvNorm, folded=self.folded)
        x = nn.relu6(conv_norm(STEM, 3, strides=2, name="stem")(images, train))
        number = 0
        for stage in STAGES[: self.stages]:
            for strides in (stage.strides, *[1] * (stage.blocks - 1)):
                x = Block(stage, strides, self.folded, name=f"block_{number}")(x, train)
                number += 1
        x = nn.relu6(conv_norm(HEAD, 1, name="head")(x, train))
        return nn.Dense(CLASSES, name="classifier")(jnp.mean(x, (1, 2)))
