"""Which convention explains what a layer gave: momentum and estimator, epsilon, scale and bias.

Everything is found from the recorded numbers alone, so that no layer is called for it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxbn.parity._epsilon import ESTIMATORS, Slopes, plainest
from jaxbn.parity._report import last_place_of_one, measure
from jaxbn.parity._trace import Batch, Step, Trace

# So many features tell an epsilon; the rest only cost time.
_FEATURES = 64
# So many different values fit into a narrow dtype by no chance: of float32, one in 2^13 does.
_MANY = 5


def rounding(trace: Trace) -> tuple[str | None, float]:
    """The narrow dtype that a layer's outputs fit into, if any, and their last place."""
    y = np.concatenate([step.y.astype(np.float32) for step in trace.steps])
    # Values that do not depend on the input, as a bias or a zero, may be round in any dtype.
    different = sum(len(np.unique(feature)) - 1 for feature in y.T)
    if different < _MANY:
        return None, last_place_of_one(trace.steps[0].y.dtype)
    with np.errstate(over="ignore"):
        for narrow in (jnp.bfloat16, jnp.float16):
            if np.array_equal(y.astype(narrow).astype(np.float32), y):
                return np.dtype(narrow).name, last_place_of_one(np.dtype(narrow))
    return None, last_place_of_one(trace.steps[0].y.dtype)


class Running(NamedTuple):
    """How running statistics move: the weight of each batch, and the estimators that fit.

    `resolution` is the error in the weights that would go unseen.
    """

    weights: np.ndarray
    cumulative: bool
    estimators: frozenset[str]
    resolution: float


def fit_running(
    trace: Trace, batches: Sequence[Batch], tolerance: float, features: np.ndarray
) -> Running | None:
    """The update that fits the means and, where one does on `features`, the variances."""
    shape = batches[0].mean.shape
    if any(v.shape != shape or not np.all(np.isfinite(v)) for s in trace.statistics() for v in s):
        return None
    best = None
    for cumulative in (False, True):
        fits = {e: _update(trace, batches, e, cumulative, features) for e in ESTIMATORS}
        estimators = frozenset(e for e in ESTIMATORS if fits[e][1] <= tolerance)
        chosen = min(ESTIMATORS, key=lambda e: fits[e][1]) if estimators else None
        weights, error, reach = _update(trace, batches, chosen, cumulative, features)
        if error > tolerance:
            continue
        if best is None or (estimators and not best.estimators):
            resolution = tolerance / reach if reach > 0 else np.inf
            best = Running(weights, cumulative, estimators, resolution)
    return best


def _update(trace, batches, estimator, cumulative, features) -> tuple[np.ndarray, float, float]:
    """The weights that fit best, the error they leave, and the longest way a statistic had to go.

    `estimator=None` looks at the means alone.
    """
    ways, moves = [], []
    for batch, old, new in zip(
        batches, trace.statistics()[:-1], trace.statistics()[1:], strict=True
    ):
        unit = np.maximum(np.sqrt(batch.var), np.maximum(np.abs(batch.mean), np.abs(old[0])))
        triples = [(old[0], batch.mean, new[0], unit)]
        if estimator is not None:
            target = batch.variance(estimator)
            triples.append((old[1], target, new[1], np.maximum(target, np.abs(old[1]))))
            triples[1] = tuple(v[features] for v in triples[1])
        ways.append(
            np.concatenate([_ratio(target - old, unit) for old, target, _, unit in triples])
        )
        moves.append(np.concatenate([_ratio(new - old, unit) for old, _, new, unit in triples]))
    ways, moves = np.stack(ways), np.stack(moves)
    if cumulative:
        weights = 1 / np.arange(1, len(batches) + 1)
    else:
        square = np.sum(ways**2)
        weights = np.full(len(batches), np.sum(ways * moves) / square if square > 0 else 0.0)
    error = np.abs(weights[:, None] * ways - moves).max(initial=0)
    return weights, float(error), float(np.abs(ways).max(initial=0))


def _ratio(value: np.ndarray, unit: np.ndarray) -> np.ndarray:
    value = value.astype(np.float64)
    return np.divide(value, unit, out=np.zeros_like(value), where=unit > 0)


class Normalization(NamedTuple):
    """How a layer normalizes: `y = scale (x - mean) / sqrt(var + epsilon) + bias`."""

    estimator: str
    epsilon: float
    scale: np.ndarray
    bias: np.ndarray


def slope(batch: Batch, y: np.ndarray) -> np.ndarray:
    """The slope of `y` in `x`, per feature."""
    x, y = batch.centered, y.astype(np.float64)
    # From the first value, so that the slope of a constant is exactly zero.
    return _ratio((x * (y - y[:1])).sum(0), (x**2).sum(0))


def fit_normalizations(
    traces: tuple[Trace, Trace],
    batches: Sequence[Batch],
    tolerance: float,
    unit: float,
    features: np.ndarray,
) -> tuple[Normalization, Normalization] | None:
    """The plainest pair of conventions that explains both layers' slopes, in both modes.

    Plainest: equal scales before unequal ones, and then as few differences as possible.
    """
    known = [_slopes(trace, batches) for trace in traces]
    # Where evaluation follows no running variance, training alone may still tell.
    modes = [(True, slice(None)), (True, slice(len(batches))), (False, slice(None))]
    for shared, rows in modes:
        arrays = [[v[rows] for v in side] for side in known]
        valid = features.copy()
        for slopes, *variances in arrays:
            valid &= np.all(slopes != 0, 0) & np.all([np.all(v > 0, 0) for v in variances], 0)
        if not valid.any():
            continue
        order = np.flatnonzero(valid)[np.argsort(batches[0].var[valid])]
        some = order[np.unique(np.linspace(0, len(order) - 1, _FEATURES).astype(int))]
        one, other = (
            Slopes(slopes[:, some], (biased[:, some], unbiased[:, some]))
            for slopes, biased, unbiased in arrays
        )
        found = plainest((one, other), shared, tolerance, unit)
        if found is not None:
            ours, theirs = (
                _normalization(trace, side, *convention)
                for trace, side, convention in zip(traces, arrays, found, strict=True)
            )
            return ours, theirs
    return None


def _normalization(
    trace: Trace, side: Sequence[np.ndarray], estimator: str, epsilon: float
) -> Normalization:
    slopes, *variances = side
    variance = np.maximum(variances[ESTIMATORS.index(estimator)], 0)
    scale = (slopes * np.sqrt(variance + epsilon)).mean(0)
    bias = np.mean([step.y.astype(np.float64).mean(0) for step in trace.steps], 0)
    return Normalization(estimator, epsilon, scale, bias)


def _slopes(trace: Trace, batches: Sequence[Batch]) -> list[np.ndarray]:
    """Slopes in training, then in evaluation, and the variances behind them, per estimator."""
    pairs = list(zip(batches, trace.steps, strict=True))
    slopes = [slope(b, s.y) for b, s in pairs] + [slope(b, s.evaluation) for b, s in pairs]
    # A statistic of the wrong shape stands behind no slope; -1 makes the features invalid.
    running = [
        s.var if s.var.shape == b.var.shape else np.full(b.var.shape, -1.0) for b, s in pairs
    ]
    return [
        np.stack(slopes),
        *(np.stack([*(b.variance(e) for b in batches), *running]) for e in ESTIMATORS),
    ]


def missed(
    trace: Trace,
    batches: Sequence[Batch],
    running: Running | None,
    normalization: Normalization | None,
    tolerance: float,
) -> set[str]:
    """The quantities that the fits do not give back."""
    result = set()
    for i, (batch, step) in enumerate(zip(batches, trace.steps, strict=True)):
        expected = {}
        if running is not None:
            expected |= _expected_running(batch, trace.statistics()[i], running, i)
        if normalization is not None:
            expected |= _expected_outputs(batch, step, normalization)
        for name, value in values(step).items():
            if name not in expected or value.shape != expected[name].shape:
                error = np.inf
            else:
                # What a constant feature was scaled by, its output does not tell.
                known = slice(None) if name.startswith("running") else batch.var > 0
                error = measure("", "", value[..., known], expected[name][..., known]).relative
            if not error <= tolerance:
                result.add(name)
    return result


def values(step: Step) -> dict[str, np.ndarray]:
    """All that a layer gave in one step, under the names of the report."""
    gradients = {f"d{name}": gradient for name, gradient in step.gradients.items()}
    return {
        "y": step.y,
        **gradients,
        "running mean": step.mean,
        "running var": step.var,
        "evaluation y": step.evaluation,
    }


def _expected_running(batch, old, running: Running, i: int) -> dict[str, np.ndarray]:
    weight = running.weights[i]
    expected = {"running mean": old[0] + weight * (batch.mean - old[0])}
    for estimator in sorted(running.estimators)[:1]:
        expected["running var"] = old[1] + weight * (batch.variance(estimator) - old[1])
    return expected


def _expected_outputs(batch: Batch, step: Step, layer: Normalization) -> dict[str, np.ndarray]:
    std = np.sqrt(batch.variance(layer.estimator) + layer.epsilon)
    x_hat = _ratio(batch.centered, std)
    dy = batch.dy.astype(np.float64)
    n = len(dy) - (layer.estimator == "unbiased")
    dx = _ratio(layer.scale * (dy - dy.mean(0) - x_hat * (dy * x_hat).sum(0) / max(n, 1)), std)
    expected = {
        "y": layer.scale * x_hat + layer.bias,
        "dx": dx,
        "dscale": (dy * x_hat).sum(0),
        "dbias": dy.sum(0),
    }
    if step.var.shape == step.mean.shape == batch.mean.shape and np.all(step.var >= 0):
        x = batch.x.astype(np.float64) - step.mean
        slope = _ratio(layer.scale, np.sqrt(step.var + layer.epsilon))
        expected["evaluation y"] = slope * x + layer.bias
    return expected
