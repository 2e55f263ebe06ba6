"""The command: train or load the network, fold it, print a table of both."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from train_examples.common.config import Config, add_options, parse
from train_examples.common.errors import needs_extra, run_command
from train_examples.common.timing import median_ratio

with needs_extra("examples"):
    from rich.console import Console
    from rich.table import Table

    from train_examples.common.checkpoint import how_to_resume
    from train_examples.fold.compare import Comparison, run


def main(argv: Sequence[str] | None = None) -> Comparison:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.fold",
        description="Trains the digits network, or loads it by --resume, and folds it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser, out=Path("out/fold"))
    config = parse(parser, Config, argv)
    result = run_command(lambda: run(config), lambda: how_to_resume(config.out))
    Console().print(comparison_table(result))
    return result


def comparison_table(result: Comparison) -> Table:
    """Return a table with a row for each measurement and a column for each network."""
    share = result.difference / result.largest
    table = Table(
        title=f"Logits differ by {result.difference:.1e} at most, {share:.1e} of the largest"
    )
    for column in ("", "trained", "folded", "folded / trained"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("test accuracy", *(f"{value:.2%}" for value in result.accuracy), "")
    values, fewer = result.values
    table.add_row("values in variables", f"{values}", f"{fewer}", f"{fewer / values:.3f}")
    for batch_size, (trained, folded) in result.seconds.items():
        milliseconds = (f"{1e3 * statistics.median(times):.2f}" for times in (trained, folded))
        ratio = f"{median_ratio(folded, trained):.2f}"
        table.add_row(f"ms for a batch of {batch_size}", *milliseconds, ratio)
    return table


if __name__ == "__main__":
    main()
