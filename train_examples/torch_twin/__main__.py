"""The command. Its options and their help need no PyTorch; everything else does."""

import sys
from collections.abc import Sequence

from train_examples.common.errors import UserError, needs_extra
from train_examples.torch_twin.config import parse_args

# Wide enough for every table, whatever the terminal: they are meant to be pasted.
WIDTH = 120


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    config = parse_args(argv)
    with needs_extra("test"):
        import torch
        from rich.console import Console

        from train_examples.torch_twin.command import run
    # Then the order of sums is the same on any number of cores.
    torch.set_num_threads(1)
    try:
        run(config, Console(width=WIDTH))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped.")


if __name__ == "__main__":
    main()
