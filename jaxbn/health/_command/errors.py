"""The error and the types that all readers of checkpoints share."""

from collections.abc import Callable

# Returns whether to read the array of a name.
Wanted = Callable[[str], bool]


class CheckpointError(Exception):
    """A checkpoint cannot be read. The text is one line."""


def missing_package(package: str, what: str) -> CheckpointError:
    """Return the error for a package of the extra `health` that is not installed."""
    return CheckpointError(f"{package} is needed to read {what}: pip install 'jaxbn[health]'")
