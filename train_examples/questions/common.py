"""What the experiments share: their size, a small network, short trainings, a verdict."""

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
CHANCE = float(np.log(10))
# The accuracy from which a network has learned something: five times that of a guess.
LEARNED = 0.5
# One object, and the rate in its state: so all rates and seeds share one compiled step.
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0, momentum=MOMENTUM)
STEP = jax.jit(train_step)


class Settings(NamedTuple):
    """How much to run: the number of seeds, and whether only to see that everything works."""

    seeds: int = 3
    quick: bool = False

    def pick(self, full: T, quick: T) -> T:
        """One of two sizes."""
        return quick if self.quick else full

    @property
    def widths(self) -> tuple[int, ...]:
        return self.pick((8, 16), (4,))

    def epochs(self, count: int) -> int:
        """Steps of so many passes over the training set."""
        return self.pick(count * (len(digits().train_images) // BATCH_SIZE), 4)


class Verdict(NamedTuple):
    """One thing that would have contradicted an answer, what was measured, and whether it did."""

    contradicted: bool
    if_so: str
    measured: str

    def __str__(self) -> str:
        word = "YES" if self.contradicted else "no"
        return f"contradicted: {word}; would be if {self.if_so}: {self.measured}."


class Score(NamedTuple):
    """Mean cross-entropy, and the share of images that are classified rightly."""

    loss: float
    accuracy: float


def plain(widths: Sequence[int]) -> ConvNet:
    """The network without normalization, and with the biases that else the norm has."""
    return ConvNet(widths=tuple(widths), norm=no_norm, use_bias=True)


@cache
def digits() -> Dataset:
    """The data, read once."""
    return data.digits()


@cache
def _init(model: nn.Module) -> Callable[..., Tree]:
    return jax.jit(partial(model.init, train=False))


def start(
    model: nn.Module, seed: int, learning_rate: float, scale: float = 1.0, dtype: Any = jnp.float32
) -> TrainState:
    """The state before the first step; `scale` multiplies the initial kernels of convolutions."""
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
    """The state with another learning rate."""
    rate = jnp.asarray(learning_rate, jnp.float32)
    old: Any = state.opt_state
    hyperparams = {**old.hyperparams, "learning_rate": rate}
    return state.replace(opt_state=old._replace(hyperparams=hyperparams))


def batches(
    count: int, seed: int, size: int = BATCH_SIZE, of: int | None = None
) -> Iterator[np.ndarray]:
    """Indices of `count` batches: epochs of training images in random order, whole batches each."""
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
    """The state after some steps; `each` sees the state after every one."""
    images, labels = digits().train_images, digits().train_labels
    for batch in batches(steps, seed):
        state, _ = STEP(state, images[batch], labels[batch])
        if each is not None:
            each(state)
    return state


@jax.jit
def logits(state: TrainState, images: ArrayLike) -> jax.Array:
    """By the moving averages."""
    return state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats}, images, train=False
    )


def score(state: TrainState, images: np.ndarray, labels: np.ndarray) -> Score:
    """Of the network by its moving averages."""
    values = logits(state, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(values, labels)
    accuracy = np.mean(np.argmax(values, -1) == labels)
    # NaN has an argmax, too: the class 0.
    return Score(float(losses.mean()), float(accuracy) if np.isfinite(values).all() else 0.1)


def test_score(state: TrainState) -> Score:
    """On the test images."""
    return score(state, digits().test_images, digits().test_labels)


def train_score(state: TrainState) -> Score:
    """On the training images."""
    return score(state, digits().train_images, digits().train_labels)


def spread(values: ArrayLike, form: str = ".3g") -> str:
    """Mean, least and largest of the seeds' values."""
    values = np.asarray(values, float)
    if not np.isfinite(values).all():
        return f"not finite in {np.sum(~np.isfinite(values))} of {values.size}"
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"
