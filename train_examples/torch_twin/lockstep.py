"""Training of all runs in lockstep, with the distances between them after every step."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import count, islice
from typing import NamedTuple

import jax
import numpy as np
from rich.progress import track

from train_examples.common import data
from train_examples.common.errors import UserError
from train_examples.torch_twin.config import Config
from train_examples.torch_twin.runs import (
    Batch,
    FlaxRun,
    Run,
    TorchRun,
    Variables,
    initial,
    network,
)

DTYPES = ("float64", "float32")
Entries = Mapping[str, np.ndarray]


class Name(NamedTuple):
    """The name of a run: "jaxbn", "PyTorch", or "reordered 0" and so on, and its dtype."""

    which: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.which} {self.dtype}"


TRUTH = Name("PyTorch", "float64")


class Distance(NamedTuple):
    """The L2 distances between two networks, relative to the second's norm.

    All entries of a kind form one vector.
    """

    parameters: float
    statistics: float


class History(NamedTuple):
    """The values of each step, from the first on.

    Attributes:
      loss: the loss of each run before the step.
      distances: the distances of each pair of runs after the step.
    """

    loss: dict[Name, list[float]]
    distances: dict[tuple[Name, Name], list[Distance]]


def train(config: Config) -> History:
    """Train all runs of a configuration, and return their losses and distances."""
    dataset = data.digits()
    # Every array has an explicit dtype, so that runs of both dtypes can be mixed. "highest" makes
    # devices other than CPUs multiply float32 in float32.
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        runs = start(config, initial(config, dataset.train_images[:1]))
        steps = track(batches(config, dataset), "training", total=config.steps)
        return lockstep(runs, pairs(runs), steps)


def start(config: Config, variables: Variables) -> dict[Name, Run]:
    """Return the runs before the first step, in both dtypes and with the same weights."""
    runs: dict[Name, Run] = {}
    for dtype in DTYPES:
        ours = FlaxRun(network(config, dtype), config, variables)
        runs[Name("jaxbn", dtype)] = ours
        runs[Name("PyTorch", dtype)] = TorchRun(config, ours.entries())
        # One is enough in float64, where rounding has little effect.
        for n in range(config.reordered if dtype == "float32" else 1):
            reorder = np.random.default_rng([config.seed, n])
            runs[Name(f"reordered {n}", dtype)] = TorchRun(config, ours.entries(), reorder)
    return runs


def pairs(runs: Iterable[Name]) -> list[tuple[Name, Name]]:
    """Pair each run with PyTorch's of its dtype, and those in float32 also with that in float64."""
    same = [(run, run._replace(which="PyTorch")) for run in runs]
    errors = [(run, TRUTH) for run in runs if run.dtype == "float32"]
    return [(run, other) for run, other in same + errors if run != other]


def batches(config: Config, dataset: data.Dataset) -> Iterator[Batch]:
    """Yield the batches of the digits example, shuffled and shifted by the seed."""
    epochs = (
        data.training_batches(
            dataset.train_images, dataset.train_labels, config.batch_size, config.seed, epoch
        )
        for epoch in count()
    )
    return (Batch(*batch) for batch in islice((b for e in epochs for b in e), config.steps))


def lockstep(
    runs: Mapping[Name, Run], pairs: Iterable[tuple[Name, Name]], batches: Iterable[Batch]
) -> History:
    """Train all runs on each batch before the next, and return their losses and distances."""
    history = History({name: [] for name in runs}, {pair: [] for pair in pairs})
    for step, batch in enumerate(batches, 1):
        for name, run in runs.items():
            history.loss[name].append(run.step(batch))
        entries = {name: run.entries() for name, run in runs.items()}
        for (one, other), distances in history.distances.items():
            distances.append(distance(entries[one], entries[other]))
            if not np.isfinite(distances[-1]).all():
                raise UserError(f"training diverged in step {step}: lower --learning-rate.")
    return history


def distance(one: Entries, other: Entries) -> Distance:
    """Return the distance of the entries `one` from `other`."""

    def relative(ending: tuple[str, ...]) -> float:
        keys = [key for key in other if key.endswith(ending)]
        # Float64, where the difference of two float32 values is more precise than in float32.
        a, b = (
            np.concatenate([entries[key].ravel() for key in keys]).astype(np.float64)
            for entries in (one, other)
        )
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return Distance(relative(("weight", "bias")), relative(("running_mean", "running_var")))
