"""Train networks with few images in a batch: batch norm, ghost batches, renormalization."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import jaxbn
import jaxbn.linen
from train_examples.common import data
from train_examples.digits.train import (
    ConvNet,
    TrainState,
    batches,
    create_state,
    evaluate,
    optimizer,
    train_step,
)

Method = Literal["batch norm", "ghost batches", "batch renormalization"]
METHODS: tuple[Method, ...] = get_args(Method)
# The batch of the reference, to which the learning rate and the momentum belong.
WHOLE = 64
LEARNING_RATE, MOMENTUM = 0.2, 0.9
R_MAX, D_MAX = 3.0, 5.0
# States with the same optimizer share compiled steps.
_optimizer = cache(optimizer)


class DenseNet(nn.Module):
    """Hidden dense layers, each followed by batch norm, which sees one value per image."""

    widths: tuple[int, ...] = (64, 64)
    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        norm = partial(jaxbn.linen.BatchNorm, use_running_average=not train, **jaxbn.PYTORCH)
        x = images.reshape(len(images), -1)
        for width in self.widths:
            x = nn.relu(norm()(nn.Dense(width, use_bias=False)(x)))
        return nn.Dense(self.classes)(x)


NETWORKS: Mapping[str, nn.Module] = {"convolutional": ConvNet(), "dense": DenseNet()}


def accuracy(network: nn.Module, method: Method, size: int, seed: int, epochs: int) -> float:
    """Train a network, and return its accuracy on the test set, by the running statistics.

    Args:
      network: the network.
      method: what normalizes `size` images together. Ghost batches are groups in a batch of 64;
        with the other two, they are the whole batch.
      size: the number of images.
      seed: of the parameters and of the order of the images.
      epochs: the passes over the training set.
    """
    digits = data.digits()
    batch_size = WHOLE if method == "ghost batches" else size
    # A smaller batch is a smaller step, in the parameters and in the running statistics.
    share = batch_size / WHOLE
    steps = epochs * (len(digits.train_images) // batch_size)
    tx = _optimizer(LEARNING_RATE * share, steps)
    state = create_state(network, digits.train_images[:1], tx, seed)
    rng = np.random.default_rng(seed)
    step = partial(_step, method=method, size=size, momentum=MOMENTUM**share)
    for _ in range(epochs):
        for batch in batches(digits.train_images, digits.train_labels, size=batch_size, rng=rng):
            state = step(state, *batch, state.step / steps)
    return evaluate(state, digits.test_images, digits.test_labels)


@partial(jax.jit, static_argnames=("method", "size", "momentum"))
def _step(
    state: TrainState,
    images: ArrayLike,
    labels: ArrayLike,
    progress: ArrayLike,
    *,
    method: Method,
    size: int,
    momentum: float,
) -> TrainState:
    """Take a step of `digits.train`, with other options of the network's batch norms.

    `progress` is the share of the training that is done.
    """
    options: dict[str, Any] = {"momentum": momentum}
    if method == "ghost batches":
        options["virtual_batch_size"] = size
    elif method == "batch renormalization":
        # The running statistics must settle before they correct anything.
        relaxed = jnp.clip((progress - 0.1) / 0.3, 0, 1)
        options |= {"r_max": 1 + (R_MAX - 1) * relaxed, "d_max": D_MAX * relaxed}
    apply = state.apply_fn
    overridden = state.replace(apply_fn=jaxbn.linen.override(apply, {"**": options}))
    new_state, _ = train_step(overridden, images, labels)
    return new_state.replace(apply_fn=apply)
