"""ResNets (He et al., 2015) with a given normalization, and their training step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

import jaxbn.linen

NORMS: dict[str, Callable[..., nn.Module]] = {
    "ours": partial(jaxbn.linen.BatchNorm, **jaxbn.FLAX),
    "Flax": partial(nn.BatchNorm, momentum=0.99, epsilon=1e-5),
}


class Block(nn.Module):
    features: int
    strides: int
    norm: Callable[..., Any]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, self.features, use_bias=False, dtype=self.dtype)
        norm = partial(self.norm, use_running_average=not train, dtype=self.dtype)
        y = nn.relu(norm()(conv((3, 3), self.strides)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), self.strides)(x))
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    features: int
    strides: int
    norm: Callable[..., Any]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(self.norm, use_running_average=not train, dtype=self.dtype)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), self.strides)(y)))
        y = norm()(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = norm()(conv(4 * self.features, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-18 by default; `RESNET50` makes it ResNet-50.

    `stem="small"` is the stem for images of about 32 pixels.
    """

    norm: Callable[..., Any]
    dtype: Any = jnp.float32
    block: Callable[..., Any] = Block
    stem: Literal["small", "imagenet"] = "imagenet"
    blocks: Sequence[int] = (2, 2, 2, 2)
    features: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        kernel, strides = ((3, 3), 1) if self.stem == "small" else ((7, 7), 2)
        x = nn.Conv(self.features, kernel, strides, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(self.norm(use_running_average=not train, dtype=self.dtype)(x))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                strides = 2 if stage > 0 and block == 0 else 1
                x = self.block(self.features * 2**stage, strides, self.norm, self.dtype)(x, train)
        x = jnp.mean(x, (1, 2), dtype=jnp.float32)
        return nn.Dense(self.classes)(x)


RESNET50: dict[str, Any] = {"block": Bottleneck, "blocks": (3, 4, 6, 3)}


def training_step(model: nn.Module) -> Callable[..., tuple[Any, jax.Array]]:
    """Return `step(variables, images, labels) -> (variables, loss)`, gradient descent."""

    def step(variables, images, labels):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, images, True, mutable=["batch_stats"]
            )
            log_p = jnp.take_along_axis(nn.log_softmax(logits), labels[:, None], -1)
            return -jnp.mean(log_p), updates

        (value, updates), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
        return {"params": params, **updates}, value

    return step
