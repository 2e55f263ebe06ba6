"""Find reasons in the conventions and parameters of two layers."""

from collections.abc import Sequence

import numpy as np

from jaxbn.parity._compare.diagnosis.evidence import (
    LAST_PLACES,
    ROLES,
    SLACK,
    Evidence,
    Finder,
    Reason,
    prone_to_cancellation,
)
from jaxbn.parity._compare.diagnosis.fits import RunningFit
from jaxbn.parity._compare.recording import Batch, Recording
from jaxbn.parity._compare.report import last_place_of_one, measure


def _momentum(candidate: Evidence, reference: Evidence, batches: Sequence[Batch]) -> list[Reason]:
    a, b = candidate.running, reference.running
    if a is None or b is None:
        return []
    threshold = max(1e-3 * max(*a.weights, *b.weights), a.resolution, b.resolution)
    if np.all(np.abs(a.weights - b.weights) <= threshold):
        return []
    explains = {"running mean"}
    for role, fit in zip(ROLES, (a, b), strict=True):
        if not fit.cumulative and abs(fit.weights[0]) <= min(fit.resolution, 1e-4):
            return [Reason(f"running statistics are not updated ({role})", explains)]
    if a.cumulative or b.cumulative:
        text = " against ".join(
            "the cumulative average" if fit.cumulative else _momentum_of(fit) for fit in (a, b)
        )
        return [Reason(f"momentum: {text}", explains)]
    text = f"momentum {_momentum_of(a)} against {_momentum_of(b)}"
    if abs(a.weights[0] + b.weights[0] - 1) < 1e-3:
        text += ": the two definitions of momentum, m and 1 - m"
    return [Reason(text, explains)]


def _momentum_of(fit: RunningFit) -> str:
    # Adding zero turns -0 into 0.
    return f"{round(1 - fit.weights[0], 5) + 0.0:g}"


def _running_variance(
    candidate: Evidence, reference: Evidence, batches: Sequence[Batch]
) -> list[Reason]:
    a, b = candidate.running, reference.running
    if a is None or b is None or not a.estimators or not b.estimators:
        return []
    if a.estimators & b.estimators:
        return []
    return [_estimators("running", min(a.estimators), min(b.estimators), batches)]


def _batch_variance(
    candidate: Evidence, reference: Evidence, batches: Sequence[Batch]
) -> list[Reason]:
    a, b = candidate.normalization, reference.normalization
    if a is None or b is None or a.estimator == b.estimator:
        return []
    return [_estimators("batch", a.estimator, b.estimator, batches)]


def _estimators(which: str, a: str, b: str, batches: Sequence[Batch]) -> Reason:
    n = len(batches[0].x)
    ratio = f"n/(n-1) = {n}/{n - 1}"
    return Reason(f"{which} variance differs by {ratio}: {a} against {b}", set())


def _epsilon(candidate: Evidence, reference: Evidence, batches: Sequence[Batch]) -> list[Reason]:
    a, b = candidate.normalization, reference.normalization
    if a is None or b is None or a.epsilon == b.epsilon:
        return []
    return [Reason(f"epsilon {_as_in_code(a.epsilon)} against {_as_in_code(b.epsilon)}", set())]


def _as_in_code(epsilon: float) -> str:
    """Write the number as code does: 1e-3, and 0.25."""
    if epsilon == 0 or 0.01 <= epsilon < 1e4:
        return f"{epsilon:g}"
    digits, exponent = f"{epsilon:.5e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _parameters(candidate: Evidence, reference: Evidence, batches: Sequence[Batch]) -> list[Reason]:
    a, b = candidate.normalization, reference.normalization
    if a is None or b is None:
        return []
    tolerance = max(candidate.tolerance, reference.tolerance)
    reasons = []
    largest = np.abs(b.scale).max() or 1.0
    # The rounding of a mean this many deviations from zero shifts the bias.
    distances = [
        np.where(np.isfinite(batch.mean_over_std), batch.mean_over_std, 0) for batch in batches
    ]
    last_place = last_place_of_one(reference.recording.steps[0].y.dtype)
    slack = tolerance * max(largest, np.abs(b.bias).max())
    slack = slack + LAST_PLACES * last_place * np.max(distances, 0) * largest
    accurate = ~prone_to_cancellation(batches, tolerance, last_place)
    difference = np.abs(a.scale - b.scale)[accurate].max(initial=0)
    if difference > SLACK * tolerance * largest:
        reasons.append(Reason(f"scale differs by up to {difference:.3g}", set()))
    # A constant feature outputs its bias and a rounding error divided by sqrt(epsilon).
    varies = np.all([batch.var > 0 for batch in batches], 0)
    if np.any((np.abs(a.bias - b.bias) > slack)[varies]):
        difference = np.abs(a.bias - b.bias)[varies].max()
        reasons.append(Reason(f"bias differs by up to {difference:.3g}", set()))
    return reasons


def other_start(candidate: Recording, reference: Recording, rtol: float) -> list[Reason]:
    """Find running statistics that differ before the first step."""
    rows = [
        measure("", name, a, b)
        for name, a, b in (
            ("running mean", candidate.mean, reference.mean),
            ("running variance", candidate.var, reference.var),
        )
    ]
    differ = [row.name for row in rows if not row.note and row.relative > rtol]
    if not differ:
        return []
    return [Reason(f"initial values differ: {', '.join(differ)}", set())]


CONVENTION_FINDERS: tuple[Finder, ...] = (
    _momentum,
    _running_variance,
    _batch_variance,
    _epsilon,
    _parameters,
)
