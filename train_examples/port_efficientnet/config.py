"""The options of the command, and their checks."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train_examples.common.config import check, parse
from train_examples.common.errors import UserError

PHOTOGRAPHS, STAGES = 16, 7


@dataclass(frozen=True)
class Config:
    """The options of the command line, with their defaults."""

    stages: int = STAGES
    photographs: int = PHOTOGRAPHS
    image_size: int = 224
    training_photographs: int = 8
    training_size: int = 112
    out: Path = Path("out/port_efficientnet/efficientnet_lite0.jax")

    def __post_init__(self) -> None:
        check(1 <= self.stages <= STAGES, "--stages", f"in [1, {STAGES}]", self.stages)
        numbers = f"in [2, {PHOTOGRAPHS}]"
        for option in ("photographs", "training_photographs"):
            value = getattr(self, option)
            check(2 <= value <= PHOTOGRAPHS, f"--{option.replace('_', '-')}", numbers, value)
        # The last blocks of an image of 32 pixels are one pixel.
        for option in ("image_size", "training_size"):
            value = getattr(self, option)
            check(value >= 32, f"--{option.replace('_', '-')}", "at least 32", value)
        if self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; it must be a file, or not exist yet.")


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Return the configuration of a command line, or exit with a message if an option is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.port_efficientnet",
        description="Ports EfficientNet-Lite0 with its ImageNet weights from PyTorch to Flax, and "
        "compares, folds, recalibrates, fine-tunes and exports it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    help = "stages of the network; with fewer than all, the layers after them are not trained"
    add("--stages", type=int, default=Config.stages, help=help)
    add("--photographs", type=int, default=Config.photographs, help="photographs to classify")
    add("--image-size", type=int, default=Config.image_size, help="their pixels on a side")
    help = "photographs to compare and train with"
    add("--training-photographs", type=int, default=Config.training_photographs, help=help)
    help = "their pixels on a side"
    add("--training-size", type=int, default=Config.training_size, help=help)
    add("--out", type=Path, metavar="FILE", default=Config.out, help="the exported network")
    return parse(parser, Config, argv)
