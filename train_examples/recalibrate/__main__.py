"""The command: train, average, recalibrate, print a table of scores on the test set."""

import argparse
from collections.abc import Sequence

from train_examples.common.config import Config, parse
from train_examples.common.errors import needs_extra, run_command

with needs_extra("examples"):
    from rich.console import Console
    from rich.table import Table

    from train_examples.recalibrate.compare import Case, compare


def main(argv: Sequence[str] | None = None) -> list[Case]:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.recalibrate",
        description="Trains the digits network, and recalibrates it with averaged weights and on "
        "images of another contrast.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=Config.epochs, help="passes over the training set")
    add("--batch-size", type=int, default=Config.batch_size, help="images in a batch")
    add("--seed", type=int, default=Config.seed, help="of parameters, data order, augmentation")
    config = parse(parser, Config, argv)
    cases = run_command(lambda: compare(config))
    Console().print(table(cases))
    return cases


def table(cases: Sequence[Case]) -> Table:
    """Return a table with two rows for each case: accuracy and cross-entropy."""
    result = Table(title="The test set, normalized by")
    result.add_column("")
    for statistics in ("running averages", "recalibrated"):
        result.add_column(statistics, justify="right")
    for name, running, recalibrated in cases:
        both = (running, recalibrated)
        result.add_row(f"{name}: accuracy", *(f"{scores.accuracy:.2%}" for scores in both))
        result.add_row("cross-entropy", *(f"{scores.loss:.4f}" for scores in both))
    return result


if __name__ == "__main__":
    main()
