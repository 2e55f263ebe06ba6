"""Train a Flax NNX network with batch norm on scikit-learn's handwritten digits.

Copy this file to start a project of your own. It needs jax, flax, optax, numpy and jaxbn, and
scikit-learn for the digits; run it with `python train_examples/digits/train_nnx.py`. Its comments
say where batch norm needs care. `train.py` does the same in Flax Linen.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

import jaxbn
from jaxbn.nnx import BatchNorm


class ConvNet(nnx.Module):
    """Stages of two convolutions, each followed by batch norm, with pooling between stages."""

    def __init__(
        self, channels: int = 1, widths: Sequence[int] = (32, 64), classes: int = 10, *, seed: int
    ) -> None:
        rngs = nnx.Rngs(seed)
        # Batch norm subtracts the mean, so a bias in the convolution before it has no effect.
        he_normal = nnx.initializers.he_normal()
        conv = partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=he_normal)
        # With a momentum of 0.9 (PyTorch writes 0.1) the running statistics settle within a few
        # epochs; with Flax's 0.99 they would take ten times as long.
        norm = partial(BatchNorm, **jaxbn.PYTORCH)
        self.stages = nnx.List()
        for width in widths:
            layers = nnx.Sequential(
                conv(channels, width, rngs=rngs), norm(width, rngs=rngs), nnx.relu,
                conv(width, width, rngs=rngs), norm(width, rngs=rngs), nnx.relu,
            )  # fmt: skip
            self.stages.append(layers)
            channels = width
        self.dense = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, images: ArrayLike) -> jax.Array:
        x = jnp.asarray(images)
        for number, stage in enumerate(self.stages):
            if number > 0:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            x = stage(x)
        return self.dense(jnp.mean(x, (1, 2)))


def make_optimizer(model: nnx.Module, learning_rate: float, steps: int) -> nnx.Optimizer:
    """Return SGD with Nesterov momentum, weight decay, a warmup, and a cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    tx = optax.chain(
        # Weight decay is for kernels: the mask spares biases, and the scales of batch norms.
        optax.add_decayed_weights(1e-3, mask=jaxbn.decay_mask),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )
    # The running statistics are of another kind, `nnx.BatchStat`: the optimizer leaves them alone.
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
def train_step(
    model: ConvNet, optimizer: nnx.Optimizer, images: ArrayLike, labels: ArrayLike
) -> jax.Array:
    """Take one step of the optimizer on one batch, and return the mean loss of the batch."""

    def loss_fn(model: ConvNet) -> jax.Array:
        # In training mode, the call also updates the running statistics in `model`.
        losses = optax.softmax_cross_entropy_with_integer_labels(model(images), labels)
        return losses.mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def predict(model: ConvNet, images: ArrayLike) -> jax.Array:
    """Return the class of each image."""
    return jnp.argmax(model(images), -1)


def evaluate(model: ConvNet, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images that are classified correctly, for a model in `eval` mode."""
    # With running statistics a prediction does not depend on the other images of the batch, so
    # batches may be of any size, and the last one smaller.
    predictions = [predict(model, images[i : i + 256]) for i in range(0, len(images), 256)]
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

    model = ConvNet(seed=0)
    optimizer = make_optimizer(model, learning_rate, epochs * (len(train) // batch_size))
    for epoch in range(1, epochs + 1):
        # Each batch is normalized by its own statistics, which also update the running ones.
        model.train()
        losses = []
        for batch in batches(images[train], labels[train], size=batch_size, rng=rng):
            losses.append(train_step(model, optimizer, *batch))
        # The running statistics normalize. Without this call, test images would be normalized
        # together, and the running statistics would move towards theirs.
        model.eval()
        accuracy = evaluate(model, images[test], labels[test])
        print(f"epoch {epoch}: loss {np.mean(losses):.4f}, test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
