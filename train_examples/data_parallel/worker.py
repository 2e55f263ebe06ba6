"""The command that the launcher starts: one of several processes."""

import os
import sys
import time

from train_examples.common.errors import UserError
from train_examples.data_parallel.config import parse_args
from train_examples.data_parallel.processes import EXPLAINED, end_with_launcher, joined
from train_examples.data_parallel.train import run


def main() -> None:
    """Run the command line, which says which process this is, and of how many."""
    end_with_launcher()
    config = parse_args()
    try:
        with joined(config):
            run(config)
    except UserError as error:
        print(f"process {config.process_id}: error: {error}", file=sys.stderr, flush=True)
        # Other processes usually print the same error: let them. Then exit as `joined` does.
        time.sleep(1)
        os._exit(EXPLAINED)


if __name__ == "__main__":
    main()
