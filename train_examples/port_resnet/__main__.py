"""The command. `--help` works without PyTorch, which everything else needs."""

import sys
from collections.abc import Sequence

from train_examples.common.errors import UserError, needs_extra
from train_examples.port_resnet.config import WeightsError, parse_args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    config = parse_args(argv)
    with needs_extra("test"):
        from rich.console import Console

        from train_examples.port_resnet.command import run
    try:
        run(config, Console())
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        # The exit status of argparse for a wrong option.
        sys.exit(2)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped.")


if __name__ == "__main__":
    main()
