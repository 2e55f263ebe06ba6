"""What a command says where a package that it needs is not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

OWN = ("benchmarks", "jaxbn", "train_examples")


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Exit with one line that names the extra to install, if an import fails for want of it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OWN:
            raise
        sys.exit(f'error: {package} is not installed; pip install -e ".[{extra}]" installs it.')
