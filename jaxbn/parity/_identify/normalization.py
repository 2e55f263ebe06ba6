"""Find how a layer normalizes: which variance it divides by, and what epsilon it adds."""

import math
from typing import NamedTuple

import numpy as np

from jaxbn.parity._identify.black_box import (
    BATCH_SIZES,
    BlackBox,
    over_biased,
    probe_batch,
    shortest_decimal,
)

_LARGEST_DEVIATION = 30.0
_TINY_DEVIATION = 1e-6  # shrinks the running variance, but is not zero
_SHRINKING_STEPS = 64


class Normalization(NamedTuple):
    """The linear map from input to output.

    Attributes:
      scale, bias: the layer's parameters, of shape (C,).
      epsilon: the value added to the variance, or to the standard deviation.
      in_variance: whether it is added to the variance.
      estimator: the estimator of the variance.
    """

    scale: np.ndarray
    bias: np.ndarray
    epsilon: float
    in_variance: bool
    estimator: str

    def slope(self, var: np.ndarray) -> np.ndarray:
        if self.in_variance:
            return self.scale / np.sqrt(var + self.epsilon)
        return self.scale / (np.sqrt(var) + self.epsilon)


def find_normalization(box: BlackBox) -> Normalization:
    """Find the estimator from batches of several sizes, and epsilon from batches of small variance.

    At one batch size the estimator cannot be distinguished from another scale, but at several it
    can. Where the variance is near epsilon, the slope changes in a way that no scale explains.
    """
    box.probe = "batch variance"
    by_size = {
        size: _slope(box, probe_batch(size, 0, _LARGEST_DEVIATION, box.num_features))
        for size in BATCH_SIZES
    }
    slope, bias = by_size[BATCH_SIZES[-1]]
    height = np.abs(slope) * _LARGEST_DEVIATION
    signal = height / np.maximum(height + np.abs(bias), np.finfo(np.float32).tiny)
    if signal.max() < 1e-3:
        box.fail("no feature has a scale that is large enough beside its bias to be measured")
    usable = signal >= signal.max() / 10
    estimator = _find_estimator(box, {n: s[usable] for n, (s, _) in by_size.items()})

    box.probe = "epsilon"
    factor = over_biased(estimator, BATCH_SIZES[-1])
    variances = factor * 10.0 ** np.arange(3, -14, -1)
    steps = [
        probe_batch(BATCH_SIZES[-1], 0, (v / factor) ** 0.5, box.num_features) for v in variances
    ]
    heights = np.abs([_slope(box, x)[0] * np.sqrt(factor * x.var(0, np.float64)) for x in steps])
    relative = heights[:, usable] / heights[0, usable]
    epsilon, in_variance = _find_epsilon(box, variances, relative)
    box.found["epsilon"] = shortest_decimal(epsilon, 0.01 * epsilon)
    if not in_variance:
        box.found["epsilon_added_to"] = "the standard deviation"

    variance = np.full(box.num_features, factor * _LARGEST_DEVIATION**2)
    unit = Normalization(np.ones_like(bias), bias, box.found["epsilon"], in_variance, estimator)
    return unit._replace(scale=slope / unit.slope(variance))


def _slope(box: BlackBox, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make a training step on a batch around zero, and return the slope and bias of its output."""
    y = box.train(x)
    x = x.astype(np.float64)
    bias = y.mean(0)
    slope = (x * y).sum(0) / (x * x).sum(0)
    residual = np.abs(y - bias - slope * x).max(0)
    if (residual > 1e-3 * (np.abs(slope) * np.abs(x).max() + np.abs(bias)) + 1e-30).any():
        box.fail("the output is not a linear function of a feature's values")
    return slope, bias


def _find_estimator(box: BlackBox, slopes: dict[int, np.ndarray]) -> str:
    """Find the estimator of the batch variance from the slope at each batch size."""
    largest = BATCH_SIZES[-1]
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN and infinity fit no estimator
        ratios = np.array([np.median((slopes[largest] / slopes[n]) ** 2) for n in BATCH_SIZES])
    for estimator in ("biased", "unbiased"):
        expected = np.array([over_biased(estimator, size) for size in BATCH_SIZES])
        if np.abs(ratios * expected[-1] / expected - 1).max() < 0.01:
            box.found["batch_variance"] = estimator
            return estimator
    box.fail(
        f"batches of {BATCH_SIZES} values are divided by {', '.join(f'{r:.3g}' for r in ratios)} "
        f"times the variance at {largest} values; 1, 1, 1 would be the biased estimator, 1.88, "
        "1.41, 1 the unbiased one"
    )


def _find_epsilon(box: BlackBox, variances: np.ndarray, relative: np.ndarray) -> tuple[float, bool]:
    """Return epsilon, and whether it is added to the variance.

    If epsilon is added to the variance, the square of (x - mean) / y is linear in the variance. If
    it is added to the standard deviation, (x - mean) / y is linear in the standard deviation.

    Args:
      box: the layer, for errors.
      variances: the variances of the probes, falling.
      relative: for each variance and feature, the standard deviation divided by (x - mean) / y,
        relative to that at the first variance.
    """
    fits = []
    for in_variance, power in ((True, 2), (False, 1)):
        size = variances ** (power / 2)
        line = size[:, None] / np.maximum(relative, 1e-3) ** power  # slope * size + intercept
        epsilons, misfit = [], 0.0
        for values, visible in zip(line.T, (relative > 0.1).T, strict=True):
            terms = np.stack([size, np.ones_like(size)], 1)[visible] / values[visible, None]
            at = np.abs(terms).max(0)
            (slope, intercept), *_ = np.linalg.lstsq(terms / at, np.ones(len(terms)), rcond=None)
            misfit = max(misfit, np.abs(terms / at @ [slope, intercept] - 1).max())
            epsilons.append((intercept / at[1]) / (slope / at[0]) if slope > 0 else math.nan)
        epsilon = float(np.median(epsilons))
        if np.ptp(epsilons) > 0.05 * abs(epsilon):
            misfit = math.inf
        fits.append((misfit, epsilon, in_variance))
    if (relative[-1] > 0.99).all():
        box.fail(
            f"it has no effect down to a variance of {variances[-1]:.0e}; batch_norm needs one"
        )
    misfit, epsilon, in_variance = min(fits)
    if not misfit < 0.01:
        shown = ", ".join(f"{np.median(r):.2g}" for r in relative[::2])
        box.fail(
            "the outputs at falling variances fit no value added to the variance or to the "
            "standard deviation; at variances from 1e3 down by factors of 100, relative to the "
            f"first, they are {shown}"
        )
    return epsilon, in_variance


def shrink_running_variance(box: BlackBox, epsilon: float) -> None:
    """Train on batches of almost no variance, until epsilon shows in evaluation.

    This stops after a fixed number of steps, which may not be enough for a momentum near 1.
    """
    x = probe_batch(BATCH_SIZES[-1], 0, _TINY_DEVIATION, box.num_features)
    for _ in range(_SHRINKING_STEPS):
        box.train(x)
        if box.running()[1].max() < 1e-3 * epsilon:
            return
