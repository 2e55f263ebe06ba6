"""The command: train, print a table of accuracies, write pictures."""

import argparse
from collections.abc import Sequence

from train_examples.common.config import Config, add_options, parse
from train_examples.common.errors import needs_extra, run_command
from train_examples.common.storage import writing

with needs_extra("examples"):
    from rich.console import Console
    from rich.table import Table

    from train_examples.common.checkpoint import how_to_resume
    from train_examples.digits.plots import write_pictures
    from train_examples.digits.run import Result, check_norms, train


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the command line `argv`."""
    config = parse_args(argv)
    return run_command(lambda: run(config), lambda: how_to_resume(config.out))


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Return the configuration of a command line; exit with a message if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.digits",
        description="Trains a convolutional network with batch normalization to read digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser)
    return parse(parser, Config, argv)


def run(config: Config) -> Result:
    """Train as `config` says, print accuracies and the health of the norms, and draw pictures."""
    result = train(config)
    console = Console()
    console.print(accuracy_table(result))
    with writing("pictures", config.out):
        paths = write_pictures(result, config.out)
    for path in paths:
        console.print(f"wrote {path}")
    print(check_norms(config, result))
    return result


def accuracy_table(result: Result) -> Table:
    """Return the accuracy on the test set, by the statistics that normalize it."""
    table = Table(title=f"Test accuracy after {len(result.history.test_accuracy)} epochs")
    table.add_column("normalized by")
    table.add_column("accuracy", justify="right")
    table.add_row("the moving averages", f"{result.accuracy['moving']:.2%}")
    table.add_row("each batch's own statistics", f"{result.accuracy['batch']:.2%}")
    return table


if __name__ == "__main__":
    main()
