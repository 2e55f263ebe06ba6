"""Train the digits network with an EMA of its weights, and score it with three sets of statistics.

As a command, it prints the table of the scores.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxbn.calibrate import recalibrate
from train_examples.common.config import Config
from train_examples.common.errors import UserError, needs_extra, run_command

with needs_extra("examples"):
    import optax
    from rich.console import Console
    from rich.table import Table

    from train_examples.common.data import load
    from train_examples.common.training import ONE_DEVICE, fit, network
    from train_examples.digits.train import Metrics, TrainState, train_step
    from train_examples.recalibrate.compare import scores

Variables = dict[str, Any]
DECAYS = (0.9, 0.99, 0.999)
STATISTICS = ("last", "averaged", "recalibrated")


class EmaStep:
    """A train step that also averages weights and running statistics.

    Attributes:
      kept: by the step after which they are kept, the variables of the last step; and by decay, the
        averaged variables.
    """

    def __init__(self, decays: Sequence[float], keep_after: Sequence[int]):
        # They divide by 1 - decay ** steps: the initial weights have no part in the average.
        self.averages = [optax.ema(decay) for decay in decays]
        self.updates = [jax.jit(average.update) for average in self.averages]
        self.states: list[Any] = []
        self.keep_after = keep_after
        self.kept: dict[int, tuple[Variables, list[Variables]]] = {}

    def __call__(
        self, state: TrainState, images: ArrayLike, labels: ArrayLike
    ) -> tuple[TrainState, Metrics]:
        state, metrics = train_step(state, images, labels)
        last = {"params": state.params, "batch_stats": state.batch_stats}
        if not self.states:
            self.states = [average.init(last) for average in self.averages]
        pairs = [
            update(last, before) for update, before in zip(self.updates, self.states, strict=True)
        ]
        self.states = [new for _, new in pairs]
        if int(state.step) in self.keep_after:
            self.kept[int(state.step)] = (last, [averaged for averaged, _ in pairs])
        return state, metrics


def measure(config: Config, decays: Sequence[float]) -> np.ndarray:
    """Train as `config` says, and score in the middle and at the end of the training.

    Returns:
      An array (2 times, decays, statistics, 2) of accuracies and cross-entropies.
    """
    model = network(config)
    images = len(load(config.dataset, config.data_dir).train_images)
    steps = config.epochs * (images // config.batch_size)
    step = EmaStep(decays, (steps // 2, steps))
    with tempfile.TemporaryDirectory() as folder:
        own = replace(config, out=Path(folder))
        _, _, dataset = fit(model, own, ONE_DEVICE._replace(step=step))
    # The result does not depend on the sizes. Equal ones compile once.
    batches = np.array_split(dataset.train_images, 3)
    score = partial(scores, model, dataset=dataset)

    def three(last: Variables, averaged: Variables) -> list[Any]:
        recalibrated = recalibrate(model, averaged, batches, train=True)
        mixed = {**averaged, "batch_stats": last["batch_stats"]}
        return [score(mixed), score(averaged), score(recalibrated)]

    return np.asarray(
        [[three(last, average) for average in averages] for last, averages in step.kept.values()]
    )


def main(argv: Sequence[str] | None = None) -> np.ndarray:
    """Run the command line `argv`, and return what `measure` does for each seed."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.recalibrate.ema",
        description="Trains the digits network with an exponential moving average (EMA) of its "
        "weights, and scores it on the test set with three sets of statistics.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=Config.epochs, help="passes over the training set")
    add("--seeds", type=int, default=3, help="how many networks")
    options = parser.parse_args(argv)
    return run_command(lambda: run(options.epochs, options.seeds))


def run(epochs: int, seeds: int) -> np.ndarray:
    """Train a network for each seed, and print the table."""
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}.")
    result = np.stack([measure(Config(epochs=epochs, seed=seed), DECAYS) for seed in range(seeds)])
    Console().print(table(result))
    return result


def table(result: np.ndarray) -> Table:
    """Return the mean accuracy and cross-entropy over the seeds, and the latter's range."""
    drawn = Table(title="Means over the seeds, on the test set")
    for name in ("training", "decay", "statistics"):
        drawn.add_column(name)
    for name in ("accuracy", "cross-entropy (range)"):
        drawn.add_column(name, justify="right")

    names = (("half", "all"), (f"{decay:g}" for decay in DECAYS), STATISTICS)
    of_rows = np.moveaxis(result, 0, -1).reshape(-1, 2, len(result))
    for row, (accuracies, losses) in zip(product(*names), of_rows, strict=True):
        range_ = f"({losses.min():.4f} to {losses.max():.4f})"
        drawn.add_row(*row, f"{accuracies.mean():.2%}", f"{losses.mean():.4f} {range_}")
    return drawn


if __name__ == "__main__":
    main()
