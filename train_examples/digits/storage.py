"""A folder that a run writes to: held by one run at a time, its disk's errors told in a line."""

import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train_examples.digits.config import UserError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is created where it is missing, for this run alone.

    The operating system lets go of it when the process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out {folder}: another run is writing there; wait for its end, or name another "
                f"folder."
            ) from None
        yield


@contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Raise an error of the operating system as a `UserError` that says what was not written."""
    # Orbax logs the error that it raises, with a traceback for each of its threads.
    logger = logging.getLogger("absl")
    logger.addFilter(_is_no_error)
    try:
        yield
    except (OSError, ValueError) as error:
        reason = _system_error(error)
        if reason is None:
            raise
        raise UserError(
            f"--out {folder}: {what} cannot be written there ({reason}). Mend that, or name "
            f"another folder; what was written before is still whole."
        ) from None
    finally:
        logger.removeFilter(_is_no_error)


def _is_no_error(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR


def _system_error(error: Exception) -> str | None:
    """Return what the operating system says in `error`, or None where it says nothing."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore, below Orbax, raises a ValueError with the number in its text.
    number = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(number[1])) if number else None
