"""Check that an error has exactly the expected text."""

from contextlib import contextmanager

import pytest


@contextmanager
def raises(error, text):
    """Expect an error of this type whose whole text is `text`."""
    with pytest.raises(error) as info:
        yield
    assert str(info.value) == text
