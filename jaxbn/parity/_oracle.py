"""The textbook's batch norm and its gradients, computed in extended precision."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_LONG = np.longdouble


class Result(NamedTuple):
    """One training step. `y` and `dx` have the shape of `x`, everything else has shape (C,)."""

    y: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def batch_norm(
    x: ArrayLike,
    dy: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    ddof: int = 0,
    mask: ArrayLike | None = None,
) -> Result:
    """Return the output, the gradients of `sum(y * dy)`, and the mean and biased variance.

    Args:
      x: the batch, with its C features on `axis`.
      dy: the cotangent of the output, in the shape of `x`.
      scale: of shape (C,); ones if None.
      bias: of shape (C,); zeros if None.
      axis: the feature axis.
      epsilon: is added to the variance.
      ddof: 1 normalizes with the unbiased variance, 0 with the biased one.
      mask: False where a value does not count, and where the output is the bias. Its shape
        broadcasts to that of `x`.
    """
    x, dy = _long(x), _long(dy)
    valid = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)

    def by_feature(values: np.ndarray) -> np.ndarray:
        # Sums over a contiguous last axis are pairwise.
        values = np.moveaxis(values, axis, 0)
        return np.ascontiguousarray(values.reshape(len(values), -1))

    def like_x(values: np.ndarray) -> np.ndarray:
        shape = np.moveaxis(x, axis, 0).shape
        return np.moveaxis(values.reshape(shape), 0, axis)

    values, cotangents, valid = map(by_feature, (x, dy, valid))
    dbias = cotangents.sum(1)
    values, cotangents = (np.where(valid, v, _LONG(0)) for v in (values, cotangents))
    features = (len(values), 1)
    scale = np.ones(features, _LONG) if scale is None else _long(scale).reshape(features)
    bias = np.zeros(features, _LONG) if bias is None else _long(bias).reshape(features)
    # Where nothing counts, all sums are zero, and so are the moments.
    n = np.maximum(valid.sum(1, keepdims=True), 1).astype(_LONG)
    mean = values.sum(1, keepdims=True) / n
    centered = np.where(valid, values - mean, _LONG(0))
    squares = (centered**2).sum(1, keepdims=True)
    divisor = np.maximum(n - ddof, 1)
    std = np.sqrt(squares / divisor + _LONG(epsilon))
    x_hat = centered / std
    dscale = (cotangents * x_hat).sum(1, keepdims=True)
    dx = cotangents - cotangents.sum(1, keepdims=True) / n - x_hat * dscale / divisor
    return Result(
        y=like_x(scale * x_hat + bias),
        dx=like_x(np.where(valid, scale / std * dx, _LONG(0))),
        dscale=dscale[:, 0],
        dbias=dbias,
        mean=mean[:, 0],
        var=(squares / n)[:, 0],
    )


def error(value: ArrayLike, truth: ArrayLike) -> float:
    """Return the largest difference, relative to the largest value of the truth unless that is 0.

    Raises:
      ValueError: if the shapes differ.
    """
    value, truth = _long(value), _long(truth)
    if value.shape != truth.shape:
        raise ValueError(f"value has shape {value.shape}, and the truth {truth.shape}.")
    largest = np.abs(truth).max(initial=0)
    return float(np.abs(value - truth).max(initial=0) / (largest if largest > 0 else 1))


def _long(values: ArrayLike) -> np.ndarray:
    return np.asarray(values).astype(_LONG)
