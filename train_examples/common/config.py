"""The options of a training run, and the check of their values."""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from train_examples.common.errors import UserError

DATASETS = ("digits", "mnist", "cifar10")
DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Config:
    """The options of a run: the command line's, with its defaults."""

    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.2
    seed: int = 0
    dtype: str = "float32"
    dataset: str = "digits"
    data_dir: Path | None = None
    out: Path = Path("out/digits")
    resume: bool = False

    def __post_init__(self) -> None:
        check(self.epochs >= 1, "--epochs", "at least 1", self.epochs)
        check(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        positive = 0 < self.learning_rate < math.inf
        check(positive, "--learning-rate", "positive and finite", self.learning_rate)
        check(0 <= self.seed < 2**32, "--seed", "in [0, 2^32)", self.seed)
        check(self.dtype in DTYPES, "--dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        check(self.dataset in DATASETS, "--dataset", f"one of {', '.join(DATASETS)}", self.dataset)
        if self.dataset == "digits" and self.data_dir is not None:
            raise UserError(
                f"--data-dir {self.data_dir} is for --dataset mnist or cifar10: the digits "
                f"come with scikit-learn."
            )
        if self.dataset != "digits" and self.data_dir is None:
            raise UserError(f"--dataset {self.dataset} needs --data-dir, the folder of its files.")
        # Anything else that is wrong with the path is noticed when something is written there.
        if os.path.isfile(self.out):
            raise UserError(f"--out {self.out} is a file; it must be a folder, or not exist yet.")

    def decisive(self) -> dict[str, Any]:
        """Return the options that determine the trained parameters: all but the folders."""
        return {k: v for k, v in asdict(self).items() if k not in ("data_dir", "out", "resume")}


C = TypeVar("C")


def add_options(parser: argparse.ArgumentParser, out: Path = Config.out) -> None:
    """Add an option for each field of a `Config`."""
    add = parser.add_argument
    add("--epochs", type=int, default=Config.epochs, help="passes over the training set")
    add("--batch-size", type=int, default=Config.batch_size, help="images in a batch")
    add("--learning-rate", type=float, default=Config.learning_rate, help="after the warmup")
    add("--seed", type=int, default=Config.seed, help="of parameters, data order, augmentation")
    add("--dtype", choices=DTYPES, default=Config.dtype, help="of the activations")
    add("--dataset", choices=DATASETS, default=Config.dataset, help="what to learn")
    add("--out", type=Path, default=out, help="folder for checkpoints and pictures")
    # A default of None or False would only clutter the help.
    add("--data-dir", type=Path, default=argparse.SUPPRESS, help="files of mnist or cifar10")
    add("--resume", action="store_true", default=argparse.SUPPRESS, help="continue a stopped run")


def parse(parser: argparse.ArgumentParser, of: type[C], argv: Sequence[str] | None = None) -> C:
    """Return the command line `argv` as a configuration; exit with a message if it is wrong."""
    try:
        return of(**vars(parser.parse_args(argv)))
    except UserError as error:
        parser.error(str(error))


def check(holds: bool, option: str, wanted: str, got: object) -> None:
    """Raise a `UserError` that names an option, unless its value `holds`."""
    if not holds:
        raise UserError(f"{option} must be {wanted}, got {got}.")
