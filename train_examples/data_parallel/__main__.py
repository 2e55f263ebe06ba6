"""The command: train in this process, or launch the processes that train."""

import sys
from collections.abc import Sequence

from train_examples.common.errors import needs_extra, run_command
from train_examples.data_parallel.config import how_to_resume, parse_args
from train_examples.data_parallel.launch import launch


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    config = parse_args(argv)

    def run() -> None:
        if config.processes > 1:
            launch(sys.argv[1:] if argv is None else argv, config)
        else:
            # Imported here, since the launcher does not need it: it takes seconds, and memory.
            with needs_extra("examples"):
                from train_examples.data_parallel import train

            train.run(config)

    run_command(run, lambda: how_to_resume(config))


if __name__ == "__main__":
    main()
