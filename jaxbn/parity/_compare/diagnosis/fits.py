"""Find the convention that explains a recording: momentum, estimators, epsilon, scale and bias.

Everything is found from the recorded numbers alone, without calling a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn.parity._compare.diagnosis.epsilon import ESTIMATORS, Slopes, simplest_fit
from jaxbn.parity._compare.recording import Batch, Recording, Step
from jaxbn.parity._compare.report import last_place_of_one, measure

# This many features determine an epsilon. More would only take time.
_MAX_FEATURES = 64
# Of float32 values, one in 2^13 fits into half precision. This many different ones never do.
_MIN_DISTINCT_OUTPUTS = 5


def rounded_dtype(recording: Recording) -> tuple[str | None, float]:
    """Return the half-precision dtype that outputs are rounded to, if any, and the last place of 1.

    The last place is that of the half-precision dtype, or else of the outputs' own dtype.
    """
    y = np.concatenate([step.y.astype(np.float32) for step in recording.steps])
    # Values that do not depend on the input, such as a bias or zero, may fit into any dtype.
    different = sum(len(np.unique(feature)) - 1 for feature in y.T)
    if different >= _MIN_DISTINCT_OUTPUTS:
        with np.errstate(over="ignore"):
            for half in (jnp.bfloat16, jnp.float16):
                if np.array_equal(y.astype(half).astype(np.float32), y):
                    return np.dtype(half).name, last_place_of_one(np.dtype(half))
    return None, last_place_of_one(recording.steps[0].y.dtype)


class RunningFit(NamedTuple):
    """How the running statistics are updated.

    Attributes:
      weights: the weight of each batch.
      cumulative: whether these are the weights of the cumulative average.
      estimators: the estimators of the variance that fit.
      resolution: the largest error of the weights that would not be noticed.
    """

    weights: np.ndarray
    cumulative: bool
    estimators: frozenset[str]
    resolution: float


def fit_running(
    recording: Recording, batches: Sequence[Batch], tolerance: float, features: np.ndarray
) -> RunningFit | None:
    """Find the update that fits the running means and, if possible, the running variances.

    Of the variances, only those of `features` are used.
    """
    shape = batches[0].mean.shape
    if any(
        v.shape != shape or not np.all(np.isfinite(v))
        for statistics in recording.running()
        for v in statistics
    ):
        return None
    best = None
    for cumulative in (False, True):
        fits = {e: _fit_update(recording, batches, e, cumulative, features) for e in ESTIMATORS}
        estimators = frozenset(e for e in ESTIMATORS if fits[e][1] <= tolerance)
        chosen = min(ESTIMATORS, key=lambda e: fits[e][1]) if estimators else None
        weights, error, reach = _fit_update(recording, batches, chosen, cumulative, features)
        if error > tolerance:
            continue
        if best is None or (estimators and not best.estimators):
            resolution = tolerance / reach if reach > 0 else np.inf
            best = RunningFit(weights, cumulative, estimators, resolution)
    return best


def _fit_update(
    recording, batches, estimator, cumulative, features
) -> tuple[np.ndarray, float, float]:
    """Return the weights that fit best, their error, and the largest distance to a batch's value.

    `estimator=None` fits the means alone.
    """
    distances, moves = [], []
    running = recording.running()
    for batch, old, new in zip(batches, running[:-1], running[1:], strict=True):
        magnitude = np.maximum(np.sqrt(batch.var), np.maximum(np.abs(batch.mean), np.abs(old[0])))
        updates = [(old[0], batch.mean, new[0], magnitude)]
        if estimator is not None:
            target = batch.variance(estimator)
            variances = (old[1], target, new[1], np.maximum(target, np.abs(old[1])))
            updates.append(tuple(v[features] for v in variances))
        distances.append(np.concatenate([_ratio(target - o, m) for o, target, _, m in updates]))
        moves.append(np.concatenate([_ratio(n - o, m) for o, _, n, m in updates]))
    distances, moves = np.stack(distances), np.stack(moves)
    if cumulative:
        weights = 1 / np.arange(1, len(batches) + 1)
    else:
        square = np.sum(distances**2)
        weight = np.sum(distances * moves) / square if square > 0 else 0.0
        weights = np.full(len(batches), weight)
    error = np.abs(weights[:, None] * distances - moves).max(initial=0)
    return weights, float(error), float(np.abs(distances).max(initial=0))


def _ratio(value: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """Divide, with zero where the divisor is not positive."""
    value = value.astype(np.float64)
    return np.divide(value, divisor, out=np.zeros_like(value), where=divisor > 0)


class NormalizationFit(NamedTuple):
    """How a layer normalizes: `y = scale (x - mean) / sqrt(var + epsilon) + bias`.

    Attributes:
      estimator: the estimator of `var` in training.
      epsilon: the value added to it.
      scale, bias: the parameters, of shape (C,).
    """

    estimator: str
    epsilon: float
    scale: np.ndarray
    bias: np.ndarray


def slope(batch: Batch, y: np.ndarray) -> np.ndarray:
    """Return the slope of `y` as a function of the batch, per feature."""
    x, y = batch.centered, y.astype(np.float64)
    # Relative to the first value, so that the slope of a constant is exactly zero.
    return _ratio((x * (y - y[:1])).sum(0), (x**2).sum(0))


def fit_normalizations(
    recordings: tuple[Recording, Recording],
    batches: Sequence[Batch],
    tolerance: float,
    last_place: float,
    features: np.ndarray,
) -> tuple[NormalizationFit, NormalizationFit] | None:
    """Find the simplest pair of conventions that explains both layers' slopes, in both modes.

    Equal scales are simpler than different ones, and then as few differences as possible.

    Args:
      recordings: those of the two layers.
      batches: the batches that they were recorded on.
      tolerance: the largest relative error of a slope that counts as explained.
      last_place: the relative rounding error of the outputs.
      features: which features to use, of shape (C,).
    """
    known = [_slopes(recording, batches) for recording in recordings]
    # If evaluation does not use the running variance, training alone may still fit.
    attempts = [(True, slice(None)), (True, slice(len(batches))), (False, slice(None))]
    for same_scale, rows in attempts:
        arrays = [[v[rows] for v in layer] for layer in known]
        valid = features.copy()
        for slopes, *variances in arrays:
            valid &= np.all(slopes != 0, 0) & np.all([np.all(v > 0, 0) for v in variances], 0)
        if not valid.any():
            continue
        order = np.flatnonzero(valid)[np.argsort(batches[0].var[valid])]
        some = order[np.unique(np.linspace(0, len(order) - 1, _MAX_FEATURES).astype(int))]
        one, other = (
            Slopes(slopes[:, some], (biased[:, some], unbiased[:, some]))
            for slopes, biased, unbiased in arrays
        )
        found = simplest_fit((one, other), same_scale, tolerance, last_place)
        if found is not None:
            ours, theirs = (
                _normalization_fit(recording, layer, *convention)
                for recording, layer, convention in zip(recordings, arrays, found, strict=True)
            )
            return ours, theirs
    return None


def _normalization_fit(
    recording: Recording, layer: Sequence[np.ndarray], estimator: str, epsilon: float
) -> NormalizationFit:
    slopes, *variances = layer
    variance = np.maximum(variances[ESTIMATORS.index(estimator)], 0)
    scale = (slopes * np.sqrt(variance + epsilon)).mean(0)
    bias = np.mean([step.y.astype(np.float64).mean(0) for step in recording.steps], 0)
    return NormalizationFit(estimator, epsilon, scale, bias)


def _slopes(recording: Recording, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Return the slopes in training, then in evaluation, and their variances per estimator."""
    pairs = list(zip(batches, recording.steps, strict=True))
    slopes = [slope(b, s.y) for b, s in pairs] + [slope(b, s.evaluation) for b, s in pairs]
    # A running variance of the wrong shape explains no slope; -1 makes the features invalid.
    running = [
        s.var if s.var.shape == b.var.shape else np.full(b.var.shape, -1.0) for b, s in pairs
    ]
    return [
        np.stack(slopes),
        *(np.stack([*(b.variance(e) for b in batches), *running]) for e in ESTIMATORS),
    ]


def unexplained_quantities(
    recording: Recording,
    batches: Sequence[Batch],
    running: RunningFit | None,
    normalization: NormalizationFit | None,
    tolerance: float,
) -> set[str]:
    """Return the names of the quantities that the fits do not predict within `tolerance`."""
    result = set()
    for i, (batch, step) in enumerate(zip(batches, recording.steps, strict=True)):
        expected = {}
        if running is not None:
            expected |= _expected_running(batch, recording.running()[i], running, i)
        if normalization is not None:
            expected |= _expected_outputs(batch, step, normalization)
        for name, value in step.quantities().items():
            if name not in expected or value.shape != expected[name].shape:
                error = np.inf
            else:
                # The output of a constant feature does not show its scale.
                known = slice(None) if name.startswith("running") else batch.var > 0
                error = measure("", "", value[..., known], expected[name][..., known]).relative
            if not error <= tolerance:
                result.add(name)
    return result


def _expected_running(batch: Batch, old, fit: RunningFit, i: int) -> dict[str, np.ndarray]:
    weight = fit.weights[i]
    expected = {"running mean": old[0] + weight * (batch.mean - old[0])}
    for estimator in sorted(fit.estimators)[:1]:
        expected["running var"] = old[1] + weight * (batch.variance(estimator) - old[1])
    return expected


def _expected_outputs(batch: Batch, step: Step, fit: NormalizationFit) -> dict[str, np.ndarray]:
    std = np.sqrt(batch.variance(fit.estimator) + fit.epsilon)
    x_hat = _ratio(batch.centered, std)
    dy = batch.dy.astype(np.float64)
    n = len(dy) - (fit.estimator == "unbiased")
    dx = _ratio(fit.scale * (dy - dy.mean(0) - x_hat * (dy * x_hat).sum(0) / max(n, 1)), std)
    expected = {
        "y": fit.scale * x_hat + fit.bias,
        "dx": dx,
        "dscale": (dy * x_hat).sum(0),
        "dbias": dy.sum(0),
    }
    if step.var.shape == step.mean.shape == batch.mean.shape and np.all(step.var >= 0):
        x = batch.x.astype(np.float64) - step.mean
        slope = _ratio(fit.scale, np.sqrt(step.var + fit.epsilon))
        expected["evaluation y"] = slope * x + fit.bias
    return expected
