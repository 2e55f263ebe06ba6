"""Inputs on which the float32 arithmetic of batch norms loses digits, and some that are easy."""

import numpy as np

N, C = 4096, 16
NORMAL = np.random.default_rng(0).normal(size=(N, C))
_ROW = np.arange(N)[:, None]

# Each of shape (N, C), in float64.
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
    "one spike of 1e6": np.where(_ROW == 7, 1e6, NORMAL),
    "first value a spike far from zero": np.where(_ROW == 0, 1e8, NORMAL + 1e4),
    "two clusters": np.sign(NORMAL) * 1e4 + NORMAL,
    "two clusters far from zero": np.sign(NORMAL) * 1e3 + NORMAL + 1e6,
    "halves": np.where(_ROW < N // 2, -1e5, 1e5) + NORMAL,
    "a sixteenth apart": np.where(_ROW % 16 == 9, 1e4, 0) + NORMAL,
    "ramp": _ROW + np.zeros(C),
    "ramp far from zero": _ROW + 1e6 + np.zeros(C),
    "one value apart from a constant": np.where(_ROW == 7, 2.0, 1.0) + np.zeros(C),
    "one value apart from a constant far from zero": 1e7 + (_ROW == 7) + np.zeros(C),
    "0 and 1": (NORMAL > 1).astype(float),
    "tiny": NORMAL * 1e-20,
    "tiny, far from zero": (NORMAL + 1e4) * 1e-20,
    # No value deviates by more than the 1e16 that `batch_norm` allows.
    "huge": NORMAL * 2e15,
    "huge, far from zero": (NORMAL + 1e4) * 1e15,
}
CONSTANTS = [0.0, 3.3, -1e-3, 1e-25, 123456.7, 1e34]


def representative() -> dict[str, np.ndarray]:
    """Return the few inputs of shape (N, C) whose errors are published, in float64."""
    return {
        **{name: INPUTS[name] for name in ("N(0, 1)", "N(1e3, 1)", "N(1e4, 1)", "N(1e6, 1)")},
        "constant 3.3": np.full((N, C), 3.3),
        **{name: INPUTS[name] for name in ("one spike of 1e6", "two clusters far from zero")},
        "ramp": INPUTS["ramp"],
    }
