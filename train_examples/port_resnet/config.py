"""The options of the command, and their checks."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train_examples.common.config import check, parse
from train_examples.common.errors import UserError

WIDTH = 64


class WeightsError(UserError):
    """Raised for a state dict that cannot be read, or that does not fit the network."""


@dataclass(frozen=True)
class Config:
    """The options of the command line, with their defaults."""

    state_dict: Path | None = None
    width: int | None = None
    image_size: int = 64
    batch_size: int = 8
    seed: int = 0
    out: Path = Path("out/port_resnet/resnet18.jax")

    def __post_init__(self) -> None:
        check(self.width is None or self.width >= 1, "--width", "at least 1", self.width)
        check(self.image_size >= 32, "--image-size", "at least 32", self.image_size)
        # The last stage of an image of 32 pixels is one pixel. A batch norm of two values returns
        # 1 and -1 for any values, and its gradients are mostly rounding.
        check(self.batch_size >= 4, "--batch-size", "at least 4", self.batch_size)
        check(0 <= self.seed < 2**32, "--seed", "in [0, 2^32)", self.seed)
        if self.state_dict is not None and self.width is not None:
            raise UserError("--width sets the width of random weights; --state-dict has its own.")
        if self.out.is_dir():
            raise UserError(f"--out {self.out} is a folder; it must be a file, or not exist yet.")


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Return the configuration of a command line, or exit with a message if an option is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.port_resnet",
        description="Converts a ResNet-18 from PyTorch to Flax, compares, folds and exports it.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    file = "weights in torchvision's names, .safetensors, .pt or .pth (default: random weights)"
    add("--state-dict", type=Path, metavar="FILE", help=file)
    add("--width", type=int, help=f"channels of the first stage (default: {WIDTH})")
    add("--image-size", type=int, help=f"height and width in pixels (default: {Config.image_size})")
    add("--batch-size", type=int, help=f"number of images (default: {Config.batch_size})")
    add("--seed", type=int, help=f"seed of weights and images (default: {Config.seed})")
    add("--out", type=Path, metavar="FILE", help=f"exported network (default: {Config.out})")
    return parse(parser, Config, argv)
