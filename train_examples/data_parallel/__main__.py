"""The command: trains in this process, or launches the processes that do."""

import sys
from collections.abc import Sequence

from train_examples.data_parallel.config import parse_args
from train_examples.data_parallel.launch import launch
from train_examples.digits.config import INTERRUPTED, UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line `argv`."""
    config = parse_args(argv)
    try:
        if config.processes > 1:
            launch(sys.argv[1:] if argv is None else argv, config)
        else:
            # The launcher does without: it takes seconds, and memory.
            from train_examples.data_parallel.train import run

            run(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(
            f"stopped; --resume --out {config.out} goes on after the last whole epoch.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
