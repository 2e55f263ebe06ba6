"""A whole run: the train step of `train_examples.digits.train`, with checkpoints and a history."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from rich.progress import Progress

from train_examples.common import checkpoint, data
from train_examples.common.config import Config
from train_examples.common.data import Dataset
from train_examples.common.errors import UserError
from train_examples.common.history import History
from train_examples.common.model import ConvNet
from train_examples.digits.train import Metrics, TrainState, create_state, optimizer, train_step

Tree = Any
StatisticsSource = Literal["moving", "batch"]


def forward(
    params: Tree,
    batch_stats: Tree,
    apply_fn: Any,
    images: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike | None = None,
) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
    """Return each training image's cross-entropy; then their logits and the new moving averages."""
    logits, updates = apply_fn(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mask=mask,
        mutable=["batch_stats"],
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    # A network without normalization has none.
    return losses, (logits, updates.get("batch_stats", {}))


def loss_fn(*args: Any) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
    """Return the mean cross-entropy of a batch; then logits and moving averages, as `forward`."""
    losses, rest = forward(*args)
    return losses.mean(), rest


@partial(jax.jit, static_argnames="statistics")
def correct(
    state: TrainState,
    images: ArrayLike,
    labels: ArrayLike,
    mask: ArrayLike,
    statistics: StatisticsSource = "moving",
) -> jax.Array:
    """Return how many images of a batch are classified correctly; `mask` is False for padding."""
    logits, _ = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        images,
        train=statistics == "batch",
        mask=mask,
        # Linen requires it if `train` is true. The new moving averages are dropped.
        mutable=["batch_stats"],
    )
    return jnp.sum((jnp.argmax(logits, -1) == labels) & mask)


def evaluate(
    state: TrainState,
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    statistics: StatisticsSource = "moving",
    correct: Callable[..., jax.Array] = correct,
) -> float:
    """Return the accuracy, normalized by the moving averages or by each batch's own statistics."""
    batches = data.evaluation_batches(images, labels, batch_size)
    counts = [correct(state, *batch, statistics) for batch in batches]
    return int(sum(counts)) / len(images)


class Backend(NamedTuple):
    """The functions that a run computes with; they take batches in the host's memory.

    Attributes:
      step: as `train_step`, of a state, images and labels.
      correct: as `correct`, of a state, images, labels, mask and statistics.
      place: puts the state before the first step onto the devices that `step` uses.
    """

    step: Callable[..., tuple[TrainState, Metrics]]
    correct: Callable[..., jax.Array]
    place: Callable[[TrainState], TrainState]


# The state is committed to its device, as a restored one is: both share the compiled step.
ONE_DEVICE = Backend(train_step, correct, lambda state: jax.device_put(state, jax.devices()[0]))

# One object for equal options: JAX compiles the step anew for each model and optimizer.
_network, _optimizer = cache(ConvNet), cache(optimizer)


def network(config: Config) -> ConvNet:
    """Return the network that `config` asks for."""
    return _network(dtype=jnp.dtype(config.dtype))


def initial_state(
    model: ConvNet, images: ArrayLike, tx: optax.GradientTransformation, config: Config
) -> TrainState:
    """Return the state before the first step, drawn in float32 whatever the dtype of the run."""
    dtype = jnp.promote_types(config.dtype, jnp.float32)

    def cast(leaf: ArrayLike) -> jax.Array:
        own = jnp.result_type(leaf)
        return jnp.asarray(leaf, dtype if jnp.issubdtype(own, jnp.floating) else own)

    return jax.tree.map(cast, create_state(model, images, tx, config.seed))


def fit(
    model: ConvNet,
    config: Config,
    backend: Backend = ONE_DEVICE,
    stop_after_epoch: int | None = None,
) -> tuple[TrainState, History, Dataset]:
    """Train `model`, and return the last state, the history and the data.

    `stop_after_epoch` leaves the later epochs to a resumed run.
    """
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
        tx = _optimizer(config.learning_rate, steps)
        state = backend.place(initial_state(model, images[:1], tx, config))
        history = History()
        if config.resume:
            state, history = checkpoint.restore(manager, state, config)
        else:
            history.record_moving(0, steps, state.batch_stats)

        # If there are several processes, only the first one reports.
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
