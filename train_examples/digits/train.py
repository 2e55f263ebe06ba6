"""Train a Flax Linen network with batch norm on scikit-learn's handwritten digits.

Copy this file to start a project of your own. It needs jax, flax, optax, numpy and jaxbn, and
scikit-learn for the digits; run it with `python train_examples/digits/train.py`. Its comments say
where batch norm needs care. `train_nnx.py` does the same in Flax NNX.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen.initializers import he_normal
from flax.training import train_state
from jax.typing import ArrayLike

import jaxbn
from jaxbn.linen import BatchNorm


class ConvNet(nn.Module):
    """Stages of two convolutions, each followed by batch norm, with pooling between stages."""

    widths: Sequence[int] = (32, 64)
    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        # In training, each batch is normalized by its own statistics, which also update the running
        # ones; in evaluation, by the running ones. With a momentum of 0.9 (PyTorch writes 0.1) they
        # settle within a few epochs; with Flax's 0.99 they would take ten times as long.
        norm = partial(BatchNorm, use_running_average=not train, **jaxbn.PYTORCH)
        # Batch norm subtracts the mean, so a bias in the convolution before it has no effect.
        conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=he_normal())
        x = images
        for stage, width in enumerate(self.widths):
            if stage > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for _ in range(2):
                x = nn.relu(norm()(conv(width)(x)))
        return nn.Dense(self.classes)(jnp.mean(x, (1, 2)))


class TrainState(train_state.TrainState):
    """Flax's train state, with the running statistics, which the optimizer must not touch."""

    batch_stats: Any


class Metrics(NamedTuple):
    """The mean loss of a batch, and the share of it that is classified correctly."""

    loss: jax.Array
    accuracy: jax.Array


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Return SGD with Nesterov momentum, weight decay, a warmup, and a cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    return optax.chain(
        # Weight decay is for kernels: the mask spares biases, and the scales of batch norms.
        optax.add_decayed_weights(1e-3, mask=jaxbn.decay_mask),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )


@partial(jax.jit, static_argnames="model")
def init(model: nn.Module, key: jax.Array, images: ArrayLike) -> Any:
    """Return the initial `params` and `batch_stats`: running means of 0 and variances of 1."""
    return model.init(key, images, train=False)


def create_state(
    model: nn.Module, images: ArrayLike, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """Return the state before the first step, for images of the shape of `images`."""
    variables = init(model, jax.random.key(seed), images)
    return TrainState.create(apply_fn=model.apply, tx=tx, **variables)


@jax.jit
def train_step(
    state: TrainState, images: ArrayLike, labels: ArrayLike
) -> tuple[TrainState, Metrics]:
    """Take one step of the optimizer on one batch."""

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        # With `mutable`, Flax returns the updated running statistics beside the logits.
        logits, updates = state.apply_fn(variables, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits, updates)

    (loss, (logits, updates)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    # `updates` is {"batch_stats": ...}. Without it the loss would still fall, but evaluation would
    # use the initial mean of 0 and variance of 1.
    state = state.apply_gradients(grads=grads, **updates)
    return state, Metrics(loss, jnp.mean(jnp.argmax(logits, -1) == labels))


@jax.jit
def predict(state: TrainState, images: ArrayLike) -> jax.Array:
    """Return the class of each image. The running statistics are used, and not updated."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return jnp.argmax(state.apply_fn(variables, images, train=False), -1)


def evaluate(state: TrainState, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images that are classified correctly."""
    # With running statistics a prediction does not depend on the other images of the batch, so
    # batches may be of any size, and the last one smaller.
    predictions = [predict(state, images[i : i + 256]) for i in range(0, len(images), 256)]
    return float(np.mean(np.concatenate(predictions) == labels))


def batches(*arrays: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """Yield one epoch of shuffled batches."""
    order = rng.permutation(len(arrays[0]))
    # The rest is dropped: the statistics of a few images would be poor, and another shape would
    # compile the step again. The next epoch drops other images.
    for start in range(0, len(order) - size + 1, size):
        yield [array[order[start : start + size]] for array in arrays]


def main(epochs: int = 10, batch_size: int = 64, learning_rate: float = 0.2) -> None:
    """Train on the digits, and print the loss and the test accuracy of each epoch."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    rng = np.random.default_rng(0)
    test, train = np.split(rng.permutation(len(images)), [360])

    tx = optimizer(learning_rate, epochs * (len(train) // batch_size))
    state = create_state(ConvNet(), images[:1], tx, seed=0)
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in batches(images[train], labels[train], size=batch_size, rng=rng):
            state, metrics = train_step(state, *batch)
            losses.append(metrics.loss)
        accuracy = evaluate(state, images[test], labels[test])
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}, test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
