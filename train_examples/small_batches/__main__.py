"""The command: train networks of every method, size and seed, print a table, draw a picture."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train_examples.common.errors import UserError, needs_extra, run_command
from train_examples.common.storage import writing

with needs_extra("examples"):
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from train_examples.common.plots import COLORS, DPI, tidy
    from train_examples.small_batches.train import METHODS, accuracy

SIZES = (2, 4, 8, 64)


def main(argv: Sequence[str] | None = None) -> np.ndarray:
    """Run the command line `argv`, and return the accuracies, (methods, sizes, seeds)."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.small_batches",
        description="Trains the digits network with few images in a batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=10, help="passes over the training set")
    add("--seeds", type=int, default=3, help="how many networks of each kind")
    add("--sizes", type=int, nargs="+", default=SIZES, help="images in a batch")
    add("--out", type=Path, default=Path("out/small_batches"), help="the folder of the picture")
    options = parser.parse_args(argv)
    return run_command(lambda: run(options.epochs, options.seeds, options.sizes, options.out))


def run(epochs: int, seeds: int, sizes: Sequence[int], out: Path) -> np.ndarray:
    """Train the networks, print the table and draw the picture."""
    for name, values in (("epochs", [epochs]), ("seeds", [seeds]), ("sizes", sizes)):
        if min(values) < 1:
            raise UserError(f"--{name} must be at least 1, got {min(values)}.")
    if max(sizes) > 64:
        raise UserError(f"--sizes must be at most 64, got {max(sizes)}.")
    shape = (len(METHODS), len(sizes), seeds)
    accuracies = np.empty(shape)
    for method, size, seed in track(list(np.ndindex(shape)), "networks"):
        accuracies[method, size, seed] = accuracy(METHODS[method], sizes[size], seed, epochs)
    console = Console()
    console.print(table(accuracies, sizes))
    path = out / "accuracy.png"
    with writing("the picture", out):
        out.mkdir(parents=True, exist_ok=True)
        plot(accuracies, sizes).savefig(path, dpi=DPI)
    console.print(f"wrote {path}")
    return accuracies


def table(accuracies: np.ndarray, sizes: Sequence[int]) -> Table:
    """Return the mean over the seeds, and the smallest and largest value."""
    result = Table(title="Test accuracy by the running statistics, mean (smallest to largest)")
    result.add_column("images normalized together", justify="right")
    for method in METHODS:
        result.add_column(method, justify="right")
    for row, size in enumerate(sizes):
        cells = [
            f"{of_seeds.mean():.2%} ({of_seeds.min():.2%} to {of_seeds.max():.2%})"
            for of_seeds in accuracies[:, row]
        ]
        result.add_row(str(size), *cells)
    return result


def plot(accuracies: np.ndarray, sizes: Sequence[int]) -> Figure:
    """Plot the test errors against the size, a line for each method and a point for each seed."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    ax = figure.subplots()
    tidy(ax)
    order = np.argsort(sizes)
    x = np.asarray(sizes)[order]
    for method, of_method, color in zip(METHODS, accuracies, COLORS, strict=False):
        errors = 100 * (1 - of_method[order])
        ax.plot(x, errors.mean(1), "o-", color=color, label=method)
        ax.plot(x, errors, ".", color=color, markersize=4, alpha=0.6)
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(size) for size in x])
    ax.set(xlabel="images normalized together", ylabel="test errors (%)", ylim=(0, None))
    ax.set_title("The digits network with few images in a batch")
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
