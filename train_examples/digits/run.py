"""Train the network of the command, and compute its accuracies and the health of its norms."""

from functools import partial
from typing import NamedTuple, get_args

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxbn.health import Report, check
from train_examples.common import data
from train_examples.common.config import Config
from train_examples.common.history import History
from train_examples.common.model import ConvNet, pytorch_norm
from train_examples.common.training import StatisticsSource, Tree, evaluate, fit, network
from train_examples.digits.train import TrainState

# Enough to know the statistics of the whole training set, and few enough for one batch.
STATISTICS_IMAGES = 2048


class Result(NamedTuple):
    """The end of a run.

    Attributes:
      state: the trained network.
      history: the measurements of every step and epoch.
      accuracy: on the test set, by the statistics that normalize it.
      sample: images of the training set, shifted as in training.
      training_statistics: the statistics of the sample, which the moving averages approach.
    """

    state: TrainState
    history: History
    accuracy: dict[StatisticsSource, float]
    sample: np.ndarray
    training_statistics: Tree


def train(config: Config, stop_after_epoch: int | None = None) -> Result:
    """Train a network; `stop_after_epoch` leaves the later epochs to a resumed run."""
    with jax.enable_x64(config.dtype == "float64"):
        model = network(config)
        state, history, dataset = fit(model, config, stop_after_epoch=stop_after_epoch)
        accuracy: dict[StatisticsSource, float] = {
            statistics: evaluate(
                state, dataset.test_images, dataset.test_labels, config.batch_size, statistics
            )
            for statistics in get_args(StatisticsSource)
        }
        # Shifted as in training, which changes the statistics.
        rng = np.random.default_rng(config.seed)
        sample = data.shifted(dataset.train_images[:STATISTICS_IMAGES], rng)
        statistics = training_statistics(model, state, sample)
        return Result(state, history, accuracy, sample, statistics)


def check_norms(config: Config, result: Result) -> Report:
    """Compare the moving averages with the exact statistics of the sample."""
    variables = {"params": result.state.params, "batch_stats": result.state.batch_stats}
    size = config.batch_size
    batches = np.split(result.sample, range(size, len(result.sample), size))
    with jax.enable_x64(config.dtype == "float64"):
        return check(network(config), variables, batches, train=False)


@partial(jax.jit, static_argnames="model")
def training_statistics(model: ConvNet, state: TrainState, images: ArrayLike) -> Tree:
    """Return each layer's mean and variance over all of `images`.

    With a momentum of 0, the moving averages after one batch are the statistics of that batch.
    """
    model = model.clone(norm=partial(pytorch_norm, momentum=0.0))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return updates["batch_stats"]
