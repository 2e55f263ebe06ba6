"""Calls of `batch_norm` with a bad argument, whose error has exactly the expected text."""

import numpy as np

import jaxbn
from tests.raises import raises

X = np.zeros((8, 3), np.float32)
MEAN_VAR = {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}


def assert_refused(changes, error, text):
    """Check the error of a call that is good but for the arguments in `changes`."""
    call = {"params": {}, "state": MEAN_VAR, "x": X, "train": True} | changes
    positional = [call.pop(k) for k in ("params", "state", "x", "train")]
    with raises(error, text):
        jaxbn.batch_norm(*positional, **call)
