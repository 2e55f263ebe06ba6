"""Arrangements of the hard inputs: the order of their values in a batch."""

from collections.abc import Callable

import numpy as np

from jaxbn._shift import FRACTION
from jaxbn.parity._hard_inputs import INPUTS, C, N

# The same values as a batch of images: examples, rows, columns, features.
IMAGES = (16, 16, 16, C)
EXAMPLE = N // IMAGES[0]

# What `jaxbn._moments` samples of rows, and of the same values as images.
SAMPLED = {
    "rows": np.arange(N) % FRACTION == 0,
    "images": np.arange(N) // IMAGES[2] % IMAGES[1] == (IMAGES[1] - 1) // 2,
}


def spike_at(x: np.ndarray, row: int) -> np.ndarray:
    """Move the value farthest from the median to `row`, in each feature."""
    y, features = x.copy(), np.arange(x.shape[1])
    far = np.abs(x - np.median(x, 0)).argmax(0)
    y[far, features], y[row] = x[row], x[far, features]
    return y


def with_first_example(x: np.ndarray, value: np.ndarray | float) -> np.ndarray:
    y = x.copy()
    y[:EXAMPLE] = value
    return y


def extremes_sampled(x: np.ndarray, layout: str, sign: int) -> np.ndarray:
    """Order each feature so that its largest (`sign` 1) or smallest (-1) values are sampled."""
    where = SAMPLED[layout]
    x = sign * np.sort(sign * x, 0)
    y = np.empty_like(x)
    y[~where], y[where] = np.split(x, [np.sum(~where)])
    return y


ARRANGEMENTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda x: x,
    "permuted": lambda x: np.random.default_rng(5).permutation(x),
    "sorted": lambda x: np.sort(x, 0),
    "spike first": lambda x: spike_at(x, 0),
    "spike last": lambda x: spike_at(x, N - 1),
    "spike in the middle row": lambda x: spike_at(x, SAMPLED["images"].argmax()),
    "first example zero": lambda x: with_first_example(x, 0),
    "first example constant": lambda x: with_first_example(x, x[5]),
}


def arranged(name: str, arrangement: str) -> np.ndarray:
    """Return an input of the table in float32, its values moved around in the batch."""
    if (name, arrangement) == ("huge, far from zero", "first example zero"):
        # Zero would deviate by more than 1e16 from the others.
        arrangement = "as it is"
    return ARRANGEMENTS[arrangement](INPUTS[name].astype(np.float32))
