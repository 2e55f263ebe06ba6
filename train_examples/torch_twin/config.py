"""The options of the command, and their checks."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from train_examples.common.config import check, parse
from train_examples.common.errors import UserError


@dataclass(frozen=True)
class Config:
    """The options of the command line with their defaults, and the sizes, which it does not set.

    Attributes:
      reordered: the number of further PyTorch runs in float32, which see the examples of each batch
        in another order.
    """

    steps: int = 200
    learning_rate: float = 0.1
    seed: int = 0
    out: Path = Path("out/torch_twin")
    momentum: float = 0.9
    batch_size: int = 64
    widths: tuple[int, ...] = (32, 64)
    reordered: int = 4

    def __post_init__(self) -> None:
        check(self.steps >= 1, "--steps", "at least 1", self.steps)
        positive = 0 < self.learning_rate < math.inf
        check(positive, "--learning-rate", "positive and finite", self.learning_rate)
        check(0 <= self.seed < 2**32, "--seed", "in [0, 2^32)", self.seed)
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file; it must be a folder, or not exist yet.")


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """Return the configuration of a command line, or exit with a message if an option is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.torch_twin",
        description="Trains the digits network in PyTorch and in JAX, in lockstep.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=Config.steps, help="steps of every run")
    add("--learning-rate", type=float, default=Config.learning_rate, help="constant learning rate")
    add("--seed", type=int, default=Config.seed, help="seed of weights, batches and their order")
    add("--out", type=Path, default=Config.out, help="folder of the picture and the numbers")
    return parse(parser, Config, argv)
