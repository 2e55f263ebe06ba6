"""The command. `--help` works without PyTorch, which everything else needs."""

from collections.abc import Sequence

from train_examples.common.errors import needs_extra, run_command
from train_examples.torch_twin.config import parse_args

# Wide enough for every table on any terminal, so that tables can be pasted into a page.
WIDTH = 120


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    config = parse_args(argv)
    with needs_extra("examples,torch"):
        import torch
        from rich.console import Console

        from train_examples.torch_twin.command import run
    # With one thread, the order of sums does not depend on the number of cores.
    torch.set_num_threads(1)
    run_command(lambda: run(config, Console(width=WIDTH)))


if __name__ == "__main__":
    main()
