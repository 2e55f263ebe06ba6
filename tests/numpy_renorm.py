"""Batch renormalization in NumPy and float64, forward and backward: the paper's algorithm 1."""

import numpy as np


def batch_renorm(
    params, state, x, dy, mask=None, *, r_max, d_max, momentum=0.9, epsilon=1e-5, running_ddof=1
):
    """Return `y`, `dx`, the gradients of the parameters and the new state, for features last."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(x.ndim - 1))
    counts = np.broadcast_to(True if mask is None else mask, x.shape)
    n = counts.sum(axes)

    def mean_of(values):
        return np.where(counts, values, 0).sum(axes) / n

    mean = mean_of(x)
    var = mean_of((x - mean) ** 2)
    std, running_std = np.sqrt(var + epsilon), np.sqrt(state["var"] + epsilon)
    r = np.clip(std / running_std, 1 / r_max, r_max)
    d = np.clip((mean - state["mean"]) / running_std, -d_max, d_max)

    x_hat = (x - mean) / std
    corrected = np.where(counts, x_hat * r + d, 0)
    y = params["scale"] * corrected + params["bias"]

    g = dy * params["scale"] * r
    dx = np.where(counts, (g - mean_of(g) - x_hat * mean_of(g * x_hat)) / std, 0)
    dparams = {"scale": (dy * corrected).sum(axes), "bias": dy.sum(axes)}
    new = {"mean": mean, "var": var * n / (n - running_ddof)}
    new = {k: momentum * state[k] + (1 - momentum) * new[k] for k in new}
    return y, dx, dparams, new
