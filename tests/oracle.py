"""Batch norm and its gradients as the textbook has them, in extended precision."""

from typing import NamedTuple

import numpy as np

LONG = np.longdouble


class Result(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dscale: np.ndarray
    dbias: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def batch_norm(x, dy, scale=None, bias=None, *, axis=-1, epsilon=1e-5, ddof=0, mask=None) -> Result:
    """The training step's output, its gradients for the cotangent `dy`, and the biased moments.

    `scale` and `bias` have shape (C,); `ddof=1` normalizes with the unbiased variance. Per-feature
    results have shape (C,).
    """
    x, dy = (np.moveaxis(np.asarray(v).astype(LONG), axis, -1) for v in (x, dy))
    shape, features = x.shape, x.shape[-1]
    x, dy = x.reshape(-1, features), dy.reshape(-1, features)
    scale = np.ones(features, LONG) if scale is None else np.asarray(scale).astype(LONG)
    bias = np.zeros(features, LONG) if bias is None else np.asarray(bias).astype(LONG)
    valid = np.ones(x.shape, bool)
    if mask is not None:
        valid = np.moveaxis(
            np.broadcast_to(mask, np.moveaxis(np.empty(shape), -1, axis).shape), axis, -1
        )
        valid = valid.reshape(-1, features)

    out = [np.zeros_like(x), np.zeros_like(x)]
    per_feature = np.zeros((4, features), LONG)
    for c in range(features):
        rows = valid[:, c]
        out[0][:, c] = bias[c]
        per_feature[1, c] = dy[:, c].sum()
        n = rows.sum()
        if n == 0:
            continue
        v, g = x[rows, c], dy[rows, c]
        mean = v.mean()
        var = ((v - mean) ** 2).mean()
        divisor = max(n - ddof, 1)
        std = np.sqrt(var * n / divisor + LONG(epsilon))
        v_hat = (v - mean) / std
        out[0][rows, c] = scale[c] * v_hat + bias[c]
        out[1][rows, c] = scale[c] / std * (g - g.mean() - v_hat * (g * v_hat).sum() / divisor)
        per_feature[0, c] = (g * v_hat).sum()
        per_feature[2:, c] = mean, var
    y, dx = (np.moveaxis(v.reshape(shape), -1, axis) for v in out)
    return Result(y, dx, *per_feature)


def error(value, truth) -> float:
    """The largest difference, relative to the largest value of the truth."""
    value, truth = np.asarray(value).astype(LONG), np.asarray(truth).astype(LONG)
    assert value.shape == truth.shape, (value.shape, truth.shape)
    largest = np.abs(truth).max(initial=0)
    return float(np.abs(value - truth).max(initial=0) / (largest if largest > 0 else 1))
