"""What all readers of checkpoints share."""

from collections.abc import Callable

# Whether to read the array of this name.
Wanted = Callable[[str], bool]


class CheckpointError(Exception):
    """A checkpoint cannot be read. The text is one line."""


def missing_package(package: str, what: str) -> CheckpointError:
    """Return the error that a package in the extra `health` is not installed."""
    return CheckpointError(f"{package} is missing, which reads {what}: pip install 'jaxbn[health]'")
