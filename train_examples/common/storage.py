"""The folder that a run writes to: a lock for it, and one-line errors when writing fails."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train_examples.common.errors import UserError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this run, and create it if it does not exist.

    The operating system releases the lock when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {folder}: another run is writing there; wait until it ends, or name "
                f"another folder."
            ) from None
        yield


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn an error of the operating system into a `UserError` that says what was not written."""
    # Orbax also logs the error that it raises, with a traceback for each of its threads.
    logger = logging.getLogger("absl")
    logger.addFilter(_is_below_error)
    try:
        yield
    except (OSError, ValueError) as error:
        reason = _system_error(error)
        if reason is None:
            raise
        raise UserError(
            f"--out {folder}: {what} cannot be written there ({reason}). Fix that, or name "
            f"another folder; what was written before is intact."
        ) from None
    finally:
        logger.removeFilter(_is_below_error)


def _is_below_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _system_error(error: Exception) -> str | None:
    """Return the operating system's message in `error`, or None if there is none."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore, below Orbax, raises a ValueError with the number in its text.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else None
