"""Recalibrate with few passes over the data, and measure the error.

As a command, it prints a table of the errors.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn.calibrate import recalibrate
from train_examples.common.config import Config, parse
from train_examples.common.errors import needs_extra, run_command

with needs_extra("examples"):
    from rich.console import Console
    from rich.table import Table

    from train_examples.common.data import Dataset
    from train_examples.common.training import fit, network
    from train_examples.recalibrate.compare import faint, pieces

# The batches: how many images each has, and whether the images are sorted by class.
BATCHES = ((64, False), (8, False), (64, True))
PASSES = (1, 2, None)


class Row(NamedTuple):
    """One way to recalibrate, and its outcome on the test images.

    Attributes:
      images: "usual" or "faint".
      batches: the size of the batches, and their order.
      passes: the largest number of passes, or "exact".
      change: the RMS change of the logits from those with exact statistics, relative to the
        standard deviation of the latter.
      accuracy: the share of images that is classified correctly.
    """

    images: str
    batches: str
    passes: str
    change: float
    accuracy: float


def measure(config: Config) -> list[Row]:
    """Train as `config` says, and recalibrate in every way."""
    model = network(config)
    with tempfile.TemporaryDirectory() as folder:
        state, _, dataset = fit(model, replace(config, out=Path(folder)))
    trained = {"params": state.params, "batch_stats": state.batch_stats}
    of_images = partial(rows, model, trained)
    return of_images("usual", dataset) + of_images("faint", faint(dataset))


def rows(model: Any, variables: Any, name: str, dataset: Dataset) -> list[Row]:
    """Recalibrate on the training images of a data set, in every way."""
    apply = jax.jit(partial(model.apply, train=False))

    def logits(images: np.ndarray, size: int, passes: int | None) -> np.ndarray:
        batches = list(pieces(images, size))
        new = recalibrate(model, variables, batches, passes=passes, train=True)
        return np.asarray(apply(new, dataset.test_images))

    wanted = logits(dataset.train_images, len(dataset.train_images), None)
    result = []
    for size, is_sorted in BATCHES:
        images = dataset.train_images
        if is_sorted:
            images = images[np.argsort(dataset.train_labels, kind="stable")]
        for passes in PASSES:
            got = logits(images, size, passes)
            change = np.sqrt(np.mean((got - wanted) ** 2)) / np.std(wanted)
            accuracy = np.mean(np.argmax(got, -1) == dataset.test_labels)
            order = "sorted by class" if is_sorted else "random"
            texts = name, f"{size}, {order}", "exact" if passes is None else str(passes)
            result.append(Row(*texts, float(change), float(accuracy)))
    return result


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.recalibrate.passes",
        description="Trains the digits network, and recalibrates it with few passes over the data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=10, help="passes over the training set")
    add("--seed", type=int, default=Config.seed, help="of parameters, data order, augmentation")
    config = parse(parser, Config, argv)
    result = run_command(lambda: measure(config))
    Console().print(table(result))
    return result


def table(result: Sequence[Row]) -> Table:
    """Return a table of the rows."""
    drawn = Table(title="The test images after recalibration")
    for name in ("images", "batches", "passes"):
        drawn.add_column(name)
    for name in ("change of the logits", "accuracy"):
        drawn.add_column(name, justify="right")
    for row in result:
        drawn.add_row(*row[:3], f"{row.change:.1e}", f"{row.accuracy:.2%}")
    return drawn


if __name__ == "__main__":
    main()
