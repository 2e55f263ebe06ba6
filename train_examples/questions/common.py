"""What the experiments share: settings, networks, short trainings, scores and verdicts."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from train_examples.common import data
from train_examples.common.data import Dataset
from train_examples.common.model import ConvNet, no_norm
from train_examples.digits.train import TrainState, train_step

Tree = Any
T = TypeVar("T")

BATCH_SIZE = 64
MOMENTUM = 0.9
# The networks that questions 4 and 5 compare.
NETWORKS = ("with batch norm", "without")
CHANCE = float(np.log(10))
# A network with at least this accuracy has learned something: a guess has a fifth of it.
LEARNED = 0.5
# One optimizer with the rate in its state, so that all rates and seeds share one compiled step.
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0, momentum=MOMENTUM)
STEP = jax.jit(train_step)


class Settings(NamedTuple):
    """How much to run.

    Attributes:
      seeds: the number of runs of each kind.
      quick: whether to run only enough to check that everything works.
    """

    seeds: int = 3
    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        """Return `quick` in a quick run, and `full` otherwise."""
        return quick if self.quick else full

    @property
    def widths(self) -> tuple[int, ...]:
        """The numbers of channels of the networks."""
        return self.pick((8, 16), (4,))

    def epochs(self, count: int) -> int:
        """Return the number of steps in this many passes over the training set."""
        return self.pick(count * (len(digits().train_images) // BATCH_SIZE), 4)


class Verdict(NamedTuple):
    """A prediction, what was measured, and whether the prediction holds."""

    prediction: str
    measured: str
    holds: bool

    def __str__(self) -> str:
        word = "Holds" if self.holds else "Fails"
        return f"Prediction: {self.prediction}. Measured: {self.measured}. **{word}.**"


class Score(NamedTuple):
    """The mean cross-entropy, and the share of images that are classified correctly."""

    loss: float
    accuracy: float


def plain(widths: Sequence[int]) -> ConvNet:
    """Return the network without normalization, with biases in its convolutions instead."""
    return ConvNet(widths=tuple(widths), norm=no_norm, use_bias=True)


@cache
def digits() -> Dataset:
    """Return the data, read once."""
    return data.digits()


@cache
def _init(model: nn.Module) -> Callable[..., Tree]:
    return jax.jit(partial(model.init, train=False))


def start(
    model: nn.Module, seed: int, learning_rate: float, scale: float = 1.0, dtype: Any = jnp.float32
) -> TrainState:
    """Return the state before the first step.

    `scale` multiplies the initial kernels of the convolutions.
    """
    variables = _init(model)(jax.random.key(seed), digits().train_images[:1])
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    params = {
        name: {**layer, "kernel": scale * layer["kernel"]} if name.startswith("Conv_") else layer
        for name, layer in variables["params"].items()
    }
    state = TrainState.create(
        apply_fn=model.apply, params=params, batch_stats=variables.get("batch_stats", {}), tx=SGD
    )
    return with_rate(state, learning_rate)


def with_rate(state: TrainState, learning_rate: float) -> TrainState:
    """Return the state with another learning rate."""
    rate = jnp.asarray(learning_rate, jnp.float32)
    old: Any = state.opt_state
    hyperparams = {**old.hyperparams, "learning_rate": rate}
    return state.replace(opt_state=old._replace(hyperparams=hyperparams))


def batches(
    count: int, seed: int, size: int = BATCH_SIZE, of: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the indices of `count` batches.

    Each epoch shuffles the images, and drops those that do not fill a batch.
    """
    total = len(digits().train_images) if of is None else of
    rng = np.random.default_rng([seed, size])
    order = np.empty(0, int)
    for _ in range(count):
        if len(order) < size:
            order = rng.permutation(total)
        batch, order = order[:size], order[size:]
        yield batch


def train(
    state: TrainState, steps: int, seed: int, each: Callable[[TrainState], None] | None = None
) -> TrainState:
    """Return the state after `steps` steps; `each` is called with the state after every step."""
    images, labels = digits().train_images, digits().train_labels
    for batch in batches(steps, seed):
        state, _ = STEP(state, images[batch], labels[batch])
        if each is not None:
            each(state)
    return state


def kernel_length(params: Tree) -> float:
    """Return the L2 norm of all kernels of convolutions together."""
    kernels = [layer["kernel"] for name, layer in params.items() if name.startswith("Conv")]
    return float(np.sqrt(sum(np.sum(np.square(kernel, dtype=float)) for kernel in kernels)))


@jax.jit
def batch_logits(state: TrainState, images: ArrayLike) -> jax.Array:
    """Return the logits of a batch that is normalized by its own statistics."""
    logits, _ = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    return logits


@jax.jit
def logits(state: TrainState, images: ArrayLike) -> jax.Array:
    """Return the logits of images that are normalized by the moving averages."""
    return state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats}, images, train=False
    )


def score(state: TrainState, images: np.ndarray, labels: np.ndarray) -> Score:
    """Return the score of the network in evaluation, with its moving averages."""
    values = logits(state, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(values, labels)
    accuracy = np.mean(np.argmax(values, -1) == labels)
    # The argmax of NaN is class 0, so the accuracy is set to that of guessing.
    return Score(float(losses.mean()), float(accuracy) if np.isfinite(values).all() else 0.1)


def test_score(state: TrainState) -> Score:
    """Return the score on the test images."""
    return score(state, digits().test_images, digits().test_labels)


def train_score(state: TrainState) -> Score:
    """Return the score on the training images."""
    return score(state, digits().train_images, digits().train_labels)


def spread(values: ArrayLike, form: str = ".3g") -> str:
    """Return the mean of the seeds' values with the smallest and the largest, as text."""
    values = np.asarray(values, float)
    if not np.isfinite(values).all():
        return f"not finite in {np.sum(~np.isfinite(values))} of {values.size}"
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"
