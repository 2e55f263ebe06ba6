"""The training step, evaluation, and the loop around them."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from jax.typing import ArrayLike, DTypeLike
from rich.progress import Progress

from jaxbn import decay_mask
from train_examples.digits import checkpoint, data
from train_examples.digits.config import Config, UserError
from train_examples.digits.data import Dataset
from train_examples.digits.history import History
from train_examples.digits.model import ConvNet, pytorch_norm

WEIGHT_DECAY = 1e-3
# Enough to know the statistics of the whole training set, and few enough for one batch.
STATISTICS_IMAGES = 2048

Tree = Any
Statistics = Literal["moving", "batch"]


class TrainState(train_state.TrainState):
    """Flax's step, parameters and optimizer state, with the moving averages of the layers."""

    batch_stats: Tree


class Metrics(NamedTuple):
    """Means over a batch."""

    loss: jax.Array
    accuracy: jax.Array


class Result(NamedTuple):
    """What a run ends with; `accuracy` is that of the test set, by the statistics it rests on."""

    state: TrainState
    history: History
    accuracy: dict[Statistics, float]
    training_statistics: Tree


class Backend(NamedTuple):
    """How a run computes: what its loop calls, with batches in the host's memory.

    Attributes:
      step: `train_step` of a state, images and labels.
      correct: `correct` of a state, images, labels, mask and statistics.
      place: puts the state before the first step where `step` wants it.
    """

    step: Callable[..., tuple[TrainState, Metrics]]
    correct: Callable[..., jax.Array]
    place: Callable[[TrainState], TrainState]


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """Nesterov momentum and weight decay; a warmup over a tenth of the steps, a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 10, steps)
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY, mask=decay_mask),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )


def create_state(
    model: nn.Module,
    images: ArrayLike,
    tx: optax.GradientTransformation,
    seed: int,
    dtype: DTypeLike = jnp.float32,
) -> TrainState:
    """The state before the first step, for images of the shape of `images`.

    Its parameters and moving averages are of `dtype`, and begin as float32 has them.
    """
    # Compiled as one: op by op, initialization takes longer than an epoch.
    init = jax.jit(partial(model.init, train=False))
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), init(jax.random.key(seed), images))
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        # A network without normalization has none.
        batch_stats=variables.get("batch_stats", {}),
        tx=tx,
    )


def forward(
    params: Tree,
    batch_stats: Tree,
    apply_fn: Any,
    images: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
    """Each training image's cross-entropy; then their logits and the new moving averages."""
    logits, updates = apply_fn(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mask=mask,
        mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, (logits, updates.get("batch_stats", {}))


def loss_fn(*args: Any) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
    """The mean cross-entropy of a training batch; then what `forward` of `args` has besides."""
    losses, rest = forward(*args)
    return losses.mean(), rest


def train_step(
    state: TrainState, images: ArrayLike, labels: ArrayLike
) -> tuple[TrainState, Metrics]:
    """One step of the optimizer on one batch."""
    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        state.params, state.batch_stats, state.apply_fn, images, labels
    )
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
    return state, Metrics(loss, jnp.mean(jnp.argmax(logits, -1) == labels))


@partial(jax.jit, static_argnames="statistics")
def correct(
    state: TrainState,
    images: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    statistics: Statistics = "moving",
) -> jax.Array:
    """How many images of a batch are classified rightly; `mask` is False over padding."""
    logits, _ = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        images,
        train=statistics == "batch",
        mask=mask,
        # Linen insists on this where `train` is true. What would be new moving averages is dropped.
        mutable=["batch_stats"],
    )
    return jnp.sum((jnp.argmax(logits, -1) == labels) & mask)


def evaluate(
    state: TrainState,
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    statistics: Statistics = "moving",
    correct: Callable[..., jax.Array] = correct,
) -> float:
    """The accuracy, normalized by the moving averages or by each batch's own statistics."""
    batches = data.evaluation_batches(images, labels, batch_size)
    counts = [correct(state, *batch, statistics) for batch in batches]
    return int(sum(counts)) / len(images)


def training_statistics(model: ConvNet, state: TrainState, images: np.ndarray) -> Tree:
    """What the moving averages approach: each layer's mean and variance over all of `images`.

    One batch of them all, under averages that keep nothing of the past.
    """
    forgetful = model.clone(norm=partial(pytorch_norm, momentum=0.0))
    apply = jax.jit(partial(forgetful.apply, train=True, mutable=["batch_stats"]))
    _, updates = apply({"params": state.params, "batch_stats": state.batch_stats}, images)
    return updates["batch_stats"]


ONE_DEVICE = Backend(jax.jit(train_step), correct, lambda state: state)


def train(config: Config, stop_after_epoch: int | None = None) -> Result:
    """Trains a network as `config` says; `stop_after_epoch` leaves the rest to a resumed run."""
    with jax.enable_x64(config.dtype == "float64"):
        model = network(config)
        state, history, dataset = fit(model, config, ONE_DEVICE, stop_after_epoch)
        return summary(model, state, history, dataset, config)


def network(config: Config) -> ConvNet:
    """The network that `config` asks for."""
    return ConvNet(dtype=jnp.dtype(config.dtype))


def fit(
    model: ConvNet, config: Config, backend: Backend, stop_after_epoch: int | None = None
) -> tuple[TrainState, History, Dataset]:
    """Trains `model` on a `backend`: the state and history at the end, and what it has learned."""
    dataset = data.load(config.dataset, config.data_dir)
    images, labels = dataset.train_images, dataset.train_labels
    steps_per_epoch = len(images) // config.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"--batch-size must be at most {len(images)}, the number of training images, got "
            f"{config.batch_size}."
        )
    steps = config.epochs * steps_per_epoch

    with checkpoint.open_manager(config) as manager:
        tx = optimizer(config.learning_rate, steps)
        dtype = jnp.promote_types(config.dtype, jnp.float32)
        state = backend.place(create_state(model, images[:1], tx, config.seed, dtype))
        history = History()
        if config.resume:
            state, history = checkpoint.restore(manager, state, config)
        else:
            history.record_moving(0, steps, state.batch_stats)

        # Of several processes the first one reports.
        with Progress(disable=jax.process_index() > 0) as progress:
            task = progress.add_task("training", total=steps, completed=int(state.step))
            for epoch in range(len(history.test_accuracy), stop_after_epoch or config.epochs):
                for batch in data.training_batches(
                    images, labels, config.batch_size, config.seed, epoch
                ):
                    state, metrics = backend.step(state, *batch)
                    history.loss.append(float(metrics.loss))
                    history.train_accuracy.append(float(metrics.accuracy))
                    history.record_moving(len(history.loss), steps, state.batch_stats)
                    progress.advance(task)
                test_accuracy = evaluate(
                    state,
                    dataset.test_images,
                    dataset.test_labels,
                    config.batch_size,
                    correct=backend.correct,
                )
                history.test_accuracy.append(test_accuracy)
                checkpoint.save(manager, epoch + 1, state, history, config)
                progress.update(task, description=f"test accuracy {test_accuracy:.1%}")

    return state, history, dataset


def summary(
    model: ConvNet, state: TrainState, history: History, dataset: Dataset, config: Config
) -> Result:
    """Accuracy on the test set either way, and what the moving averages should be at the end."""
    accuracy: dict[Statistics, float] = {
        statistics: evaluate(
            state, dataset.test_images, dataset.test_labels, config.batch_size, statistics
        )
        for statistics in get_args(Statistics)
    }
    # Shifted as in training, which changes the statistics.
    rng = np.random.default_rng(config.seed)
    sample = data.shifted(dataset.train_images[:STATISTICS_IMAGES], rng)
    return Result(state, history, accuracy, training_statistics(model, state, sample))
