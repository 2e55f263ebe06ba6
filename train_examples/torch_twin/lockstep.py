"""All runs side by side: one batch after another, and after each how far apart they are."""

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
    """Of a run: "jaxbn", "PyTorch", or "reordered 0" and so on."""

    which: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.which} {self.dtype}"


TRUTH = Name("PyTorch", "float64")


class Distance(NamedTuple):
    """Between two networks, relative to the second: of all entries of a kind as one vector."""

    parameters: float
    statistics: float


class History(NamedTuple):
    """One value for each step, from the first on.

    Attributes:
      loss: of each run.
      distances: of each pair of runs, after the step.
    """

    loss: dict[Name, list[float]]
    distances: dict[tuple[Name, Name], list[Distance]]


def train(config: Config) -> History:
    """All runs of a configuration, and the distances that tell something."""
    dataset = data.digits()
    # Every array says its dtype, so that runs of either can go side by side. On other devices than
    # CPUs, "highest" has float32 multiplied in float32.
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        runs = start(config, initial(config, dataset.train_images[:1]))
        steps = track(batches(config, dataset), "training", total=config.steps)
        return lockstep(runs, pairs(runs), steps)


def start(config: Config, variables: Variables) -> dict[Name, Run]:
    """The runs before the first step, in both precisions and all from the same weights."""
    runs: dict[Name, Run] = {}
    for dtype in DTYPES:
        ours = FlaxRun(network(config, dtype), config, variables)
        runs[Name("jaxbn", dtype)] = ours
        runs[Name("PyTorch", dtype)] = TorchRun(config, ours.entries())
        # In float64 one is enough: rounding takes none far.
        for n in range(config.reordered if dtype == "float32" else 1):
            reorder = np.random.default_rng([config.seed, n])
            runs[Name(f"reordered {n}", dtype)] = TorchRun(config, ours.entries(), reorder)
    return runs


def pairs(runs: Iterable[Name]) -> list[tuple[Name, Name]]:
    """Each run with PyTorch's of its precision; those in float32 also with that in float64."""
    same = [(run, run._replace(which="PyTorch")) for run in runs]
    errors = [(run, TRUTH) for run in runs if run.dtype == "float32"]
    return [(run, other) for run, other in same + errors if run != other]


def batches(config: Config, dataset: data.Dataset) -> Iterator[Batch]:
    """Those of the digits example: shuffled and shifted, as the seed has it."""
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
    """Trains all runs on each batch before any sees the next."""
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
    """How far the entries of a network are from another's."""

    def relative(ending: tuple[str, ...]) -> float:
        keys = [key for key in other if key.endswith(ending)]
        # In float64, where the difference of what float32 has is exact.
        a, b = (
            np.concatenate([entries[key].ravel() for key in keys]).astype(np.float64)
            for entries in (one, other)
        )
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    return Distance(relative(("weight", "bias")), relative(("running_mean", "running_var")))
