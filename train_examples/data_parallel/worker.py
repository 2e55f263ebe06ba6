"""One process of several: what the launcher starts."""

import os
import sys
import time

from train_examples.data_parallel.config import parse_args
from train_examples.data_parallel.processes import EXPLAINED, end_with_launcher, joined
from train_examples.data_parallel.train import run
from train_examples.digits.config import UserError


def main() -> None:
    """Runs the command line, which says which process of how many this is."""
    end_with_launcher()
    config = parse_args()
    try:
        with joined(config):
            run(config)
    except UserError as error:
        print(f"process {config.process_id}: error: {error}", file=sys.stderr, flush=True)
        # The others are mostly about to say the same. Then out, as in `joined`.
        time.sleep(1)
        os._exit(EXPLAINED)


if __name__ == "__main__":
    main()
