"""The command: train, print a table of accuracies, write pictures."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from train_examples.digits.checkpoint import has_checkpoint
from train_examples.digits.config import INTERRUPTED, Config, UserError, parse_args
from train_examples.digits.plots import write_pictures
from train_examples.digits.storage import writing
from train_examples.digits.train import Result, train


def main(argv: Sequence[str] | None = None) -> Result:
    """Run the command line `argv`."""
    config = parse_args(argv)
    try:
        return run(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"stopped; {how_to_go_on(config)}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(config: Config) -> Result:
    """Train as `config` says, print the accuracies and write the pictures."""
    result = train(config)
    console = Console()
    console.print(accuracy_table(result))
    with writing("pictures", config.out):
        paths = write_pictures(result, config.out)
    for path in paths:
        console.print(f"wrote {path}")
    return result


def how_to_go_on(config: Config) -> str:
    """Return what to do after a run was interrupted."""
    if has_checkpoint(config.out):
        return "the same command with --resume goes on after the last whole epoch."
    return "no epoch was whole yet, so start the same command again."


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
