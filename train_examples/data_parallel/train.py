"""A run on many devices: the digits example's loop, with steps that many devices share."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from train_examples.common.history import History
from train_examples.common.model import ConvNet
from train_examples.common.training import Backend, StatisticsSource, correct, fit, network
from train_examples.data_parallel.batches import Batch, data_mesh, replicated, spread
from train_examples.data_parallel.config import Config
from train_examples.data_parallel.steps import STEPS
from train_examples.digits.train import Metrics, TrainState


class Result(NamedTuple):
    """The final state of a run, its history, and the devices that it ran on."""

    state: TrainState
    history: History
    mesh: Mesh


def train(config: Config, stop_after_epoch: int | None = None) -> Result:
    """Train a network; `stop_after_epoch` leaves the later epochs to a resumed run."""
    mesh = data_mesh(config.devices)
    with jax.enable_x64(config.dtype == "float64"):
        model = network(config)
        backend = on_devices(model, config.mode, mesh)
        state, history, _ = fit(model, config, backend, stop_after_epoch)
    return Result(state, history, mesh)


def run(config: Config) -> None:
    """Train on the devices of all processes of the run, and print the test accuracy."""
    if config.devices is not None:
        # The number of devices of other kinds is what the machine has.
        jax.config.update("jax_num_cpu_devices", config.devices)
    result = train(config)
    # If there are several processes, only the first one reports.
    if jax.process_index() == 0:
        print(
            f"test accuracy {result.history.test_accuracy[-1]:.2%} after {config.epochs} epochs "
            f"(mode {config.mode}, devices {result.mesh.size}, processes {config.processes})"
        )


def on_devices(model: ConvNet, mode: str, mesh: Mesh) -> Backend:
    """Return training and evaluation with every batch spread over the devices of `mesh`."""
    mapped = STEPS[mode](model, mesh)

    def step(
        state: TrainState, images: np.ndarray, labels: np.ndarray
    ) -> tuple[TrainState, Metrics]:
        return mapped(state, spread(Batch(images, labels, np.ones(len(labels), bool)), mesh))

    def correct_images(
        state: TrainState,
        images: np.ndarray,
        labels: np.ndarray,
        mask: np.ndarray,
        statistics: StatisticsSource = "moving",
    ) -> jax.Array:
        return correct(state, *spread(Batch(images, labels, mask), mesh), statistics)

    return Backend(step, correct_images, lambda state: replicated(state, mesh))
