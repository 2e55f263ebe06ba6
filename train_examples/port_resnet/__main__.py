"""The command. `--help` works without PyTorch, which everything else needs."""

import sys
from collections.abc import Sequence

from train_examples.common.errors import needs_extra, run_command
from train_examples.port_resnet.config import WeightsError, parse_args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    config = parse_args(argv)
    with needs_extra("examples,torch"):
        from rich.console import Console

        from train_examples.port_resnet.command import run

    def command() -> None:
        try:
            run(config, Console())
        except WeightsError as error:
            print(f"error: {error}", file=sys.stderr)
            # The exit status of argparse for a wrong option.
            sys.exit(2)

    run_command(command)


if __name__ == "__main__":
    main()
