"""The command: train networks of every kind, method, size and seed, print tables, draw them."""

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
    from train_examples.small_batches.train import METHODS, NETWORKS, WHOLE, accuracy

SIZES = (2, 4, 8, 64)


def main(argv: Sequence[str] | None = None) -> np.ndarray:
    """Run the command line `argv`, and return the accuracies, (networks, methods, sizes, seeds)."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.small_batches",
        description="Trains networks on digits with few images in a batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="what to train")
    add("--epochs", type=int, default=10, help="passes over the training set")
    add("--seeds", type=int, default=3, help="how many networks of each kind")
    add("--sizes", type=int, nargs="+", default=SIZES, help="images in a batch")
    add("--out", type=Path, default=Path("out/small_batches"), help="the folder of the picture")
    options = parser.parse_args(argv)
    return run_command(lambda: run(**vars(options)))


def run(
    *, networks: Sequence[str], epochs: int, seeds: int, sizes: Sequence[int], out: Path
) -> np.ndarray:
    """Train the networks, print the tables and draw the picture."""
    for name, least, values in (
        ("epochs", 1, [epochs]),
        ("seeds", 1, [seeds]),
        ("sizes", 2, sizes),
    ):
        if min(values) < least:
            raise UserError(f"--{name} must be at least {least}, got {min(values)}.")
    if max(sizes) > WHOLE:
        raise UserError(f"--sizes must be at most {WHOLE}, got {max(sizes)}.")
    shape = (len(networks), len(METHODS), len(sizes), seeds)
    accuracies = np.empty(shape)
    for which in track(list(np.ndindex(shape)), "networks"):
        network, method, size, seed = map(int, which)
        accuracies[which] = accuracy(
            NETWORKS[networks[network]], METHODS[method], sizes[size], seed, epochs
        )
    console = Console()
    for network, of_network in zip(networks, accuracies, strict=True):
        console.print(table(network, of_network, sizes))
    path = out / "accuracy.png"
    with writing("the picture", out):
        out.mkdir(parents=True, exist_ok=True)
        plot(networks, accuracies, sizes).savefig(path, dpi=DPI)
    console.print(f"wrote {path}")
    return accuracies


def table(network: str, accuracies: np.ndarray, sizes: Sequence[int]) -> Table:
    """Return the mean over the seeds, and the smallest and largest value."""
    result = Table(
        title=f"The {network} network: test accuracy by the running statistics, "
        "mean (smallest to largest)"
    )
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


def plot(networks: Sequence[str], accuracies: np.ndarray, sizes: Sequence[int]) -> Figure:
    """Plot the test errors against the size, a line for each method and a point for each seed."""
    figure = Figure(figsize=(4.8 * len(networks), 3.8), layout="constrained")
    axes = figure.subplots(1, len(networks), squeeze=False)[0]
    order = np.argsort(sizes)
    x = np.asarray(sizes)[order]
    for ax, network, of_network in zip(axes, networks, accuracies, strict=True):
        tidy(ax)
        for method, of_method, color in zip(METHODS, of_network, COLORS, strict=False):
            errors = 100 * (1 - of_method[order])
            ax.plot(x, errors.mean(1), "o-", color=color, label=method)
            ax.plot(x, errors, ".", color=color, markersize=4, alpha=0.6)
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(size) for size in x])
        ax.set(xlabel="images normalized together", ylabel="test errors (%)", ylim=(0, None))
        ax.set_title(f"The {network} network")
    axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    main()
