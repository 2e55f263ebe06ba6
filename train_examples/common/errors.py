"""The errors of a command line that its user can fix, and how every command ends."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

# The exit status of a program that Ctrl-C ends: 128 and the number of the signal.
INTERRUPTED = 130
# A package of this repository that cannot be imported is a bug, not a missing extra.
OWN_PACKAGES = ("benchmarks", "jaxbn", "train_examples")

T = TypeVar("T")


class UserError(ValueError):
    """An error that the user can fix; its text says how."""


def run_command(command: Callable[[], T], when_stopped: Callable[[], str] | None = None) -> T:
    """Run a command, and turn a `UserError` or Ctrl-C into one line on stderr.

    Args:
      command: what to run.
      when_stopped: returns what to tell the user after Ctrl-C, such as how to resume.

    Returns:
      What `command` returns.

    Raises:
      SystemExit: with status 1 after a `UserError`, and 130 after Ctrl-C.
    """
    try:
        return command()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"stopped; {when_stopped()}" if when_stopped else "stopped.", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Exit with one line that names the extra to install if an import in the block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN_PACKAGES:
            raise
        sys.exit(f'error: {package} is not installed; pip install -e ".[{extra}]" installs it.')
