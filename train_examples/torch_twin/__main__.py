"""The command: trains in lockstep, prints tables and a verdict, writes a picture and numbers."""

import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from train_examples.digits.config import UserError
from train_examples.torch_twin import report
from train_examples.torch_twin.config import Config, parse_args
from train_examples.torch_twin.lockstep import train
from train_examples.torch_twin.plots import picture

# Wide enough for every table, whatever the terminal: they are meant to be pasted.
WIDTH = 120


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`."""
    config = parse_args(argv)
    try:
        run(config, Console(width=WIDTH))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped.")


def run(config: Config, console: Console) -> None:
    """Trains, and reports; a UserError where the frameworks part in float64."""
    history = train(config)
    for table in report.tables(history):
        console.print(table)
    config.out.mkdir(parents=True, exist_ok=True)
    report.write_numbers(config, history, config.out / "distances.json")
    picture(history).savefig(config.out / "distances.png", dpi=100)
    console.print(f"wrote distances.json and distances.png to {config.out}")
    console.print(report.float32_summary(history))
    within, verdict = report.float64_verdict(history)
    console.print(verdict)
    if not within:
        raise UserError("the frameworks part in float64.")


if __name__ == "__main__":
    # Then the order of sums is the same on any number of cores.
    torch.set_num_threads(1)
    main()
