"""The command: trains, prints a table of accuracies, writes pictures."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from train_examples.digits.config import UserError, parse_args
from train_examples.digits.plots import write_pictures
from train_examples.digits.train import Result, train


def main(argv: Sequence[str] | None = None) -> Result:
    """Runs the command line `argv`."""
    config = parse_args(argv)
    try:
        result = train(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume goes on after the last whole epoch.")
    console = Console()
    console.print(accuracy_table(result))
    for path in write_pictures(result, config.out):
        console.print(f"wrote {path}")
    return result


def accuracy_table(result: Result) -> Table:
    """The accuracy on the test set, by the statistics that normalize it."""
    table = Table(title=f"Test accuracy after {len(result.history.test_accuracy)} epochs")
    table.add_column("normalized by")
    table.add_column("accuracy", justify="right")
    table.add_row("the moving averages", f"{result.accuracy['moving']:.2%}")
    table.add_row("each batch's own statistics", f"{result.accuracy['batch']:.2%}")
    return table


if __name__ == "__main__":
    main()
