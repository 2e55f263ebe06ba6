"""Check that an error has exactly the expected text."""

import re

import pytest


def raises(error, text):
    """Expect an error of this type whose whole text is `text`."""
    return pytest.raises(error, match=rf"\A{re.escape(text)}\Z")
