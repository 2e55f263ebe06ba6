"""The command. `--help` works without the packages that everything else needs."""

from collections.abc import Sequence

from train_examples.common.errors import needs_extra, run_command
from train_examples.port_efficientnet.config import parse_args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    config = parse_args(argv)
    with needs_extra("pretrained"):
        from rich.console import Console

        from train_examples.port_efficientnet.command import run
    run_command(lambda: run(config, Console()))


if __name__ == "__main__":
    main()
