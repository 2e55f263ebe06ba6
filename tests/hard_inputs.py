"""Inputs on which float32 batch norms lose digits, and how their values may lie in a batch."""

from collections.abc import Callable

import numpy as np

from jaxbn._shift import FRACTION

N, C = 4096, 16
# The same values as a batch of images: examples, rows, columns, features.
IMAGES = (16, 16, 16, C)
EXAMPLE = N // IMAGES[0]
NORMAL = np.random.default_rng(0).normal(size=(N, C))
ROW = np.arange(N)[:, None]

INPUTS = {
    "N(0, 1)": NORMAL,
    "N(2, 1)": NORMAL + 2,
    "N(0.95, 1)": NORMAL + 0.95,
    "N(1.5, 1)": NORMAL + 1.5,
    "N(1e3, 1)": NORMAL + 1e3,
    "N(1e4, 1)": NORMAL + 1e4,
    "N(-1e5, 1)": NORMAL - 1e5,
    "N(1e6, 1)": NORMAL + 1e6,
    "a mean per feature": NORMAL + 10.0 ** np.arange(-8, 8),
    "a deviation per feature": 100 + NORMAL * 10.0 ** np.arange(-8, 8),
    "spike": np.where(ROW == 7, 1e6, NORMAL),
    "first value a spike far from zero": np.where(ROW == 0, 1e8, NORMAL + 1e4),
    "two clusters": np.sign(NORMAL) * 1e4 + NORMAL,
    "two clusters far from zero": np.sign(NORMAL) * 1e3 + NORMAL + 1e6,
    "halves": np.where(ROW < N // 2, -1e5, 1e5) + NORMAL,
    "a sixteenth apart": np.where(ROW % 16 == 9, 1e4, 0) + NORMAL,
    "ramp": ROW + np.zeros(C),
    "ramp far from zero": ROW + 1e6 + np.zeros(C),
    "one value apart from a constant": np.where(ROW == 7, 2.0, 1.0) + np.zeros(C),
    "one value apart from a constant far from zero": 1e7 + (ROW == 7) + np.zeros(C),
    "0 and 1": (NORMAL > 1).astype(float),
    "tiny": NORMAL * 1e-20,
    "tiny, far from zero": (NORMAL + 1e4) * 1e-20,
    # No value deviates by more than the 1e16 that `batch_norm` allows.
    "huge": NORMAL * 2e15,
    "huge, far from zero": (NORMAL + 1e4) * 1e15,
}
CONSTANTS = [0.0, 3.3, -1e-3, 1e-25, 123456.7, 1e34]

# What `jaxbn._moments` samples of rows, and of the same values as images.
SAMPLED = {
    "rows": np.arange(N) % FRACTION == 0,
    "images": np.arange(N) // IMAGES[2] % IMAGES[1] == (IMAGES[1] - 1) // 2,
}


def spike_at(x: np.ndarray, row: int) -> np.ndarray:
    """Swap to `row`, in each feature, the value that is the farthest from the median."""
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
