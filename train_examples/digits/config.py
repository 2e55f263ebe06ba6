"""The options of a run, and what is wrong with them."""

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

DATASETS = ("digits", "mnist", "cifar10")
DTYPES = ("float32", "bfloat16", "float64")
# The exit status of a program that Ctrl-C ends: 128 and the number of the signal.
INTERRUPTED = 130


class UserError(ValueError):
    """Something that whoever started the run can mend; its text says how."""


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
        _check(self.epochs >= 1, "--epochs", "at least 1", self.epochs)
        _check(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        positive = 0 < self.learning_rate < math.inf
        _check(positive, "--learning-rate", "positive and finite", self.learning_rate)
        _check(0 <= self.seed < 2**32, "--seed", "in [0, 2^32)", self.seed)
        _check(self.dtype in DTYPES, "--dtype", f"one of {', '.join(DTYPES)}", self.dtype)
        _check(self.dataset in DATASETS, "--dataset", f"one of {', '.join(DATASETS)}", self.dataset)
        if self.dataset == "digits" and self.data_dir is not None:
            raise UserError(
                f"--data-dir {self.data_dir} is for --dataset mnist or cifar10: scikit-learn "
                f"brings the digits along."
            )
        if self.dataset != "digits" and self.data_dir is None:
            raise UserError(f"--dataset {self.dataset} needs --data-dir, the folder of its files.")
        # Whatever else is wrong with the path shows when something is written there.
        if os.path.isfile(self.out):
            raise UserError(f"--out {self.out} is a file; it must be a folder, or not exist yet.")

    def decisive(self) -> dict[str, Any]:
        """The options that the trained parameters depend on: all but where files lie."""
        return {k: v for k, v in asdict(self).items() if k not in ("data_dir", "out", "resume")}


C = TypeVar("C", bound=Config)


def parse_args(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m train_examples.digits",
        description="Trains a convolutional network with batch normalization to read digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_options(parser)
    return parse(parser, Config, argv)


def add_options(parser: argparse.ArgumentParser, out: Path = Config.out) -> None:
    """Adds an option for each field of a `Config`."""
    add = parser.add_argument
    add("--epochs", type=int, default=Config.epochs, help="passes over the training set")
    add("--batch-size", type=int, default=Config.batch_size, help="images in a batch")
    add("--learning-rate", type=float, default=Config.learning_rate, help="after the warmup")
    add("--seed", type=int, default=Config.seed, help="of parameters, data order, augmentation")
    add("--dtype", choices=DTYPES, default=Config.dtype, help="of the activations")
    add("--dataset", choices=DATASETS, default=Config.dataset, help="what to learn")
    add("--out", type=Path, default=out, help="folder for checkpoints and pictures")
    # Without a default that is worth printing.
    add("--data-dir", type=Path, default=argparse.SUPPRESS, help="files of mnist or cifar10")
    add("--resume", action="store_true", default=argparse.SUPPRESS, help="go on with a stopped run")


def parse(parser: argparse.ArgumentParser, of: type[C], argv: Sequence[str] | None = None) -> C:
    """The configuration `of` a kind that a command line asks for; exits where it is wrong."""
    try:
        return of(**vars(parser.parse_args(argv)))
    except UserError as error:
        parser.error(str(error))


def _check(holds: bool, option: str, wanted: str, got: object) -> None:
    if not holds:
        raise UserError(f"{option} must be {wanted}, got {got}.")
