"""Batch norm and its gradients as the textbook has them, in extended precision."""

import math
from collections.abc import Mapping

import numpy as np

_LONG = np.longdouble


def batch_norm(
    x: np.ndarray,
    dy: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray,
    *,
    epsilon: float,
    batch_variance: str,
) -> Mapping[str, np.ndarray]:
    """A training step's output `y` and the gradients of `sum(y * dy)`, all from (N, C)."""
    x, dy, scale, bias = (np.asarray(v).astype(_LONG) for v in (x, dy, scale, bias))
    divisor = len(x) - (batch_variance == "unbiased")
    centred = x - x.mean(0)
    std = np.sqrt((centred**2).sum(0) / divisor + _LONG(epsilon))
    x_hat = centred / std
    along = (dy * x_hat).sum(0)
    return {
        "y": scale * x_hat + bias,
        "x": scale / std * (dy - dy.mean(0) - x_hat * along / divisor),
        "scale": along,
        "bias": dy.sum(0),
    }


def error(value: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference over the largest value of the truth (or as it is, if that is 0)."""
    value = np.asarray(value).astype(_LONG)
    largest = np.abs(truth).max()
    found = float(np.abs(value - truth).max() / (largest if largest > 0 else 1))
    return found if math.isfinite(found) else math.nan
