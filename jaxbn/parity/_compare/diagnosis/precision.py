"""Find differences that come from rounding: of outputs, of variances and of means."""

from collections.abc import Sequence

import numpy as np

from jaxbn.parity._compare.diagnosis.epsilon import ESTIMATORS
from jaxbn.parity._compare.diagnosis.evidence import (
    LAST_PLACES,
    OUTPUTS,
    ROLES,
    SLACK,
    Evidence,
    Finder,
    Reason,
)
from jaxbn.parity._compare.diagnosis.faults import evaluates_with_batch_statistics
from jaxbn.parity._compare.diagnosis.fits import slope
from jaxbn.parity._compare.recording import Batch

_LAST_PLACE = np.finfo(np.float32).eps


def _rounded(candidate: Evidence, reference: Evidence, batches: Sequence[Batch]) -> list[Reason]:
    if candidate.rounded_to == reference.rounded_to:
        return []
    return [
        Reason(f"outputs are rounded to {layer.rounded_to} ({role})", set())
        for role, layer in zip(ROLES, (candidate, reference), strict=True)
        if layer.rounded_to is not None
    ]


def _cancellation(
    candidate: Evidence, reference: Evidence, batches: Sequence[Batch]
) -> list[Reason]:
    """Find a variance that is off by about the rounding error of `E[x^2]`, and whose it is."""
    worst = [_variance_loss(layer, batches) for layer in (candidate, reference)]
    largest = max(loss for loss, _ in worst)
    if largest == 0:
        return []
    # Both may have lost digits. A layer that lost only a hundredth as much is not the cause.
    roles = [role for role, (loss, _) in zip(ROLES, worst, strict=True) if loss * 100 > largest]
    distance = max(worst)[1]
    text = f"variance lost to cancellation: mean {distance:.3g} deviations from zero"
    explains = OUTPUTS - {"dbias"} | {"running var"}
    return [Reason(f"{text} ({' and '.join(roles)})", explains)]


def _variance_loss(layer: Evidence, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return the largest relative error of a variance that cancellation explains, or zero.

    The second number is how many deviations that feature's mean is from zero. Two measurements show
    the variance that a layer computed: its running variance, and the ratio of its slopes in
    evaluation, where the variance is known, and in training.
    """
    fit = layer.normalization
    estimators = ESTIMATORS if fit is None else (fit.estimator,)
    epsilons = (1e-5, 1e-3) if fit is None else (fit.epsilon,)
    losses = [(0.0, 0.0)]
    for i, (batch, step) in enumerate(zip(batches, layer.recording.steps, strict=True)):
        old = layer.recording.running()[i][1]
        if step.var.shape != batch.var.shape or np.any(step.var < 0):
            continue
        bound = LAST_PLACES * _LAST_PLACE * batch.mean_over_std**2
        candidates = (bound > SLACK * layer.tolerance) & (batch.var > 0)
        if not candidates.any():
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = []
            ratio = np.abs(slope(batch, step.evaluation) / slope(batch, step.y)) ** 2
            implied = [(step.var + e) * ratio - e for e in epsilons]
            errors.append(_smallest_error(implied, batch, estimators))
            if layer.running is not None and layer.running.weights[i] > 0:
                weight = layer.running.weights[i]
                implied = [(step.var - (1 - weight) * old) / weight]
                noise = 4 * _LAST_PLACE * np.maximum(old, step.var) / (weight * batch.var)
                error = _smallest_error(implied, batch, ESTIMATORS)
                errors.append(np.where(error > noise, error, 0))
        if evaluates_with_batch_statistics(layer, batches):
            errors = errors[1:]
        for error in errors:
            significant = candidates & (error > SLACK * layer.tolerance)
            # An error that is larger than the rounding has another reason.
            if significant.any() and np.all(error[significant] <= bound[significant]):
                c = np.argmax(np.where(significant, error, 0))
                losses.append((float(error[c]), float(batch.mean_over_std[c])))
    return max(losses)


def _smallest_error(
    implied: list[np.ndarray], batch: Batch, estimators: Sequence[str]
) -> np.ndarray:
    errors = [np.abs(v - batch.variance(e)) / batch.var for v in implied for e in estimators]
    return np.nan_to_num(np.min(errors, 0), nan=0, posinf=0)


def _mean_rounding(
    candidate: Evidence, reference: Evidence, batches: Sequence[Batch]
) -> list[Reason]:
    """Find outputs that differ by the rounding error of a mean far from zero."""
    worst = 0.0
    steps = zip(batches, candidate.recording.steps, reference.recording.steps, strict=True)
    for batch, a, b in steps:
        for ours, theirs in ((a.y, b.y), (a.evaluation, b.evaluation)):
            difference = np.abs(ours.astype(np.float64) - theirs).max(0)
            deviation = np.abs(slope(batch, theirs)) * np.sqrt(batch.var)
            limit = candidate.tolerance * np.abs(theirs).max()
            off = (difference > limit) & (batch.var > 0)
            rounding = LAST_PLACES * _LAST_PLACE * batch.mean_over_std[off] * deviation[off]
            if np.any(difference[off] > rounding):
                return []
            worst = max(worst, batch.mean_over_std[off].max(initial=0))
    if worst == 0:
        return []
    return [Reason(f"rounding of the mean: {worst:.3g} deviations from zero", set(OUTPUTS))]


def _constant_features(
    candidate: Evidence, reference: Evidence, batches: Sequence[Batch]
) -> list[Reason]:
    """Find outputs that differ only for constant features, and by no more than rounding."""
    fits = [layer.normalization for layer in (candidate, reference)]
    # If no fit gives scale and epsilon, assume the usual ones.
    known = [(np.abs(fit.scale).max(), fit.epsilon) for fit in fits if fit is not None]
    largest = max(scale / np.sqrt(max(epsilon, 1e-12)) for scale, epsilon in known or [(1, 1e-5)])
    found = False
    steps = zip(batches, candidate.recording.steps, reference.recording.steps, strict=True)
    for batch, ours, theirs in steps:
        difference = np.abs(ours.y.astype(np.float64) - theirs.y).max(0)
        off = difference > candidate.tolerance * np.abs(theirs.y).max()
        rounding = LAST_PLACES * _LAST_PLACE * np.abs(batch.mean) * largest
        if np.any(off & ((batch.var > 0) | (difference > rounding))):
            return []
        found |= bool(off.any())
    text = "constant features: their rounding errors are divided by sqrt(epsilon)"
    return [Reason(text, set(OUTPUTS))] if found else []


PRECISION_FINDERS: tuple[Finder, ...] = (
    _rounded,
    _cancellation,
    _mean_rounding,
    _constant_features,
)
