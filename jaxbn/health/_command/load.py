"""Read arrays from a checkpoint without running code in it."""

import logging
import re
import stat
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbn.health._command import orbax_directory, safetensors_file, torch_file
from jaxbn.health._command.errors import CheckpointError, Wanted


class Checkpoint(NamedTuple):
    """The arrays by name, and the step if the checkpoint has several."""

    step: int | None
    arrays: dict[str, np.ndarray]


def read(path: Path, wanted: Wanted, step: int | None = None) -> Checkpoint:
    """Return the arrays whose names are wanted.

    Args:
      path: an Orbax directory, a `.safetensors` file, or a file that `torch.save` wrote.
      wanted: a function that returns whether to read the array of a name.
      step: the step to read, if `path` is a directory with several; by default the latest.

    Raises:
      CheckpointError: the checkpoint cannot be read. The text is one line.
    """
    _check_path(path)
    if path.is_dir():
        kind, reader = "Orbax checkpoint", orbax_directory.read
    elif step is not None:
        raise CheckpointError(f"{path} is a file, which has no steps: leave out --step")
    elif path.suffix == ".safetensors":
        kind, reader = "safetensors file", safetensors_file.read
    else:
        kind, reader = "PyTorch file", torch_file.read
    try:
        with _quiet_libraries():
            if path.is_dir():
                step, path = orbax_directory.find_step(path, step)
            return Checkpoint(step, reader(path, wanted))
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(f"{path} is not a readable {kind}: {_reason(error)}") from None


def _check_path(path: Path) -> None:
    """Raise a `CheckpointError` unless the path is a readable directory or nonempty file."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            next(path.iterdir(), None)
        elif not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is neither a file nor a directory")
        elif not status.st_size:
            raise CheckpointError(f"{path} is empty")
        else:
            path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _reason(error: Exception) -> str:
    """Return the first sentence of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines() or [""]
    sentence = re.split(r"(?<=\w\.)\s", lines[0])[0].rstrip(".: ")
    return textwrap.shorten(sentence, 200, placeholder=" ...") or type(error).__name__


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Suppress the libraries' warnings and logs. Their errors are raised anyway."""
    logger = logging.getLogger("absl")  # Orbax's
    logger.addFilter(_nothing)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False
