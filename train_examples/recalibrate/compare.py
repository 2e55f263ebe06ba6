"""Train the digits network, average its weights, change its images, recalibrate, and measure."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxbn.calibrate import recalibrate
from train_examples.common.config import Config
from train_examples.common.data import Dataset, load
from train_examples.common.model import ConvNet
from train_examples.common.training import ONE_DEVICE, fit, network
from train_examples.digits.train import Metrics, TrainState, train_step

Tree = Any
# These imitate a fainter scan on grey paper.
CONTRAST, BRIGHTNESS = 0.3, 0.5


class Scores(NamedTuple):
    """The share of test images that is classified correctly, and their mean cross-entropy."""

    accuracy: float
    loss: float


class Case(NamedTuple):
    """The scores of one network on one kind of images, with either statistics."""

    name: str
    running: Scores
    recalibrated: Scores


class AveragingStep:
    """A train step that also averages the parameters after the step `start` (SWA)."""

    def __init__(self, start: int):
        self.start, self.averaged = start, 0
        self.params: Tree = None
        self.move = jax.jit(optax.incremental_update)

    def __call__(
        self, state: TrainState, images: ArrayLike, labels: ArrayLike
    ) -> tuple[TrainState, Metrics]:
        state, metrics = train_step(state, images, labels)
        if int(state.step) > self.start:
            self.averaged += 1
            before = state.params if self.params is None else self.params
            self.params = self.move(state.params, before, 1 / self.averaged)
        return state, metrics


def compare(config: Config) -> list[Case]:
    """Train as `config` says, average the second half of the steps, and score every case.

    The run's checkpoints go to a temporary folder.
    """
    model = network(config)
    images = len(load(config.dataset, config.data_dir).train_images)
    step = AveragingStep(config.epochs * (images // config.batch_size) // 2)
    with tempfile.TemporaryDirectory() as folder:
        own = replace(config, out=Path(folder))
        state, _, dataset = fit(model, own, ONE_DEVICE._replace(step=step))
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    averaged = {**trained, "params": step.params}
    size = config.batch_size
    return [
        case("trained weights", model, trained, dataset, size),
        case("averaged weights", model, averaged, dataset, size),
        case("trained weights, faint images", model, trained, faint(dataset), size),
    ]


def case(name: str, model: ConvNet, variables: Tree, dataset: Dataset, batch_size: int) -> Case:
    """Recalibrate on the training images, without their labels, and score on the test images."""
    batches = list(pieces(dataset.train_images, batch_size))
    recalibrated = recalibrate(model, variables, batches, train=True)
    of = partial(scores, model, dataset=dataset)
    return Case(name, of(variables), of(recalibrated))


def pieces(images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Yield all images once, in order; the last piece may be smaller."""
    for start in range(0, len(images), batch_size):
        yield images[start : start + batch_size]


def faint(dataset: Dataset) -> Dataset:
    """Return the same digits with another contrast and brightness, as from another scanner."""
    train, test = (
        (CONTRAST * images + BRIGHTNESS).astype(images.dtype)
        for images in (dataset.train_images, dataset.test_images)
    )
    return dataset._replace(train_images=train, test_images=test)


def scores(model: ConvNet, variables: Tree, dataset: Dataset) -> Scores:
    """Return the scores on the test set in evaluation mode."""
    logits = jax.jit(partial(model.apply, train=False))(variables, dataset.test_images)
    labels = dataset.test_labels
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return Scores(float(np.mean(np.argmax(logits, -1) == labels)), float(losses.mean()))
