"""Why two layers part. Each known reason is said only where it explains the numbers."""

from collections.abc import Sequence

import numpy as np

from jaxbn.parity._faults import FINDERS, LAST_PLACES, RUNNING, SIDES, SLACK, Reason, Seen, prone
from jaxbn.parity._fit import Running, fit_normalizations, fit_running, missed, rounding
from jaxbn.parity._report import Row, last_place_of_one, measure
from jaxbn.parity._trace import Batch, Trace


def diagnose(
    candidate: Trace,
    reference: Trace,
    batches: Sequence[Batch],
    rows: Sequence[Row],
    rtol: float,
) -> tuple[str, ...]:
    """The reasons for the rows beyond `rtol`, and the quantities that are left without one."""
    parted = {row.name: row for row in reversed(rows) if not row.relative <= rtol}
    if not parted:
        return ()
    reasons = _broken(parted, batches)
    explained = set()
    # Without outputs that can be calculated with, nothing but that can be said.
    if not any(row.note and row.name in ("y", "evaluation y") for row in rows):
        sides = _see((candidate, reference), batches, rtol)
        reasons += [reason for find in _FINDERS for reason in find(*sides, batches)]
        reasons += _other_start(candidate, reference, rtol)
        if reasons:
            # Each side does what was found of it, so that what was found is all there is.
            explained = set(parted) - sides[0].missed - sides[1].missed
    explained = explained.union(*(reason.explains for reason in reasons))
    words = [reason.words for reason in reasons]
    unexplained = [name for name in dict.fromkeys(row.name for row in rows) if name in parted]
    unexplained = [name for name in unexplained if name not in explained]
    if unexplained:
        words.append(f"no known reason: {', '.join(unexplained)}")
    return tuple(words)


def _see(traces: tuple[Trace, Trace], batches: Sequence[Batch], rtol: float) -> tuple[Seen, Seen]:
    narrow = [rounding(trace) for trace in traces]
    tolerances = [max(rtol, unit) for _, unit in narrow]
    every = np.ones(batches[0].mean.shape, bool)
    near = ~prone(batches, rtol, narrow[1][1])
    normalizations = None
    for features in (every, near):
        normalizations = normalizations or fit_normalizations(
            traces, batches, max(tolerances), max(unit for _, unit in narrow), features
        )
    seen = []
    for i, trace in enumerate(traces):
        running = fit_running(trace, batches, rtol, every)
        if running is None or not running.estimators:
            running = fit_running(trace, batches, rtol, near) or running
        normalization = None if normalizations is None else normalizations[i]
        left = missed(trace, batches, running, normalization, SLACK * tolerances[i])
        seen.append(Seen(trace, tolerances[i], narrow[i][0], running, normalization, left))
    return seen[0], seen[1]


def _broken(parted: dict[str, Row], batches: Sequence[Batch]) -> list[Reason]:
    """Rows that hold no numbers to compare."""
    reasons = []
    running = [row for name, row in parted.items() if name in RUNNING and "shape" in row.note]
    if running:
        n, features = batches[0].x.shape
        shape = running[0].note
        words = f"running statistics have {shape}"
        if f"({n},)" in shape and n != features:
            words = f"statistics of another axis: running statistics have {shape}"
        reasons.append(Reason(words, {row.name for row in running}))
    for name, row in parted.items():
        if row.note and row not in running:
            reasons.append(Reason(f"{name} at {row.stage}: {row.note}", {name}))
    return reasons


def _momentum(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    a, b = candidate.running, reference.running
    if a is None or b is None:
        return []
    threshold = max(1e-3 * max(*a.weights, *b.weights), a.resolution, b.resolution)
    if np.all(np.abs(a.weights - b.weights) <= threshold):
        return []
    explains = {"running mean"}
    for who, side in zip(SIDES, (a, b), strict=True):
        if not side.cumulative and abs(side.weights[0]) <= min(side.resolution, 1e-4):
            return [Reason(f"running statistics do not move ({who})", explains)]
    if a.cumulative or b.cumulative:
        words = " against ".join(
            "the cumulative average" if side.cumulative else _momentum_of(side) for side in (a, b)
        )
        return [Reason(f"momentum: {words}", explains)]
    words = f"momentum {_momentum_of(a)} against {_momentum_of(b)}"
    if abs(a.weights[0] + b.weights[0] - 1) < 1e-3:
        words += ": the two meanings"
    return [Reason(words, explains)]


def _momentum_of(side: Running) -> str:
    # Plus zero, which makes -0 a 0.
    return f"{round(1 - side.weights[0], 5) + 0.0:g}"


def _running_variance(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    a, b = candidate.running, reference.running
    if a is None or b is None or not a.estimators or not b.estimators:
        return []
    if a.estimators & b.estimators:
        return []
    return [_estimators("running", min(a.estimators), min(b.estimators), batches)]


def _batch_variance(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    a, b = candidate.normalization, reference.normalization
    if a is None or b is None or a.estimator == b.estimator:
        return []
    return [_estimators("batch", a.estimator, b.estimator, batches)]


def _estimators(which: str, a: str, b: str, batches: Sequence[Batch]) -> Reason:
    n = len(batches[0].x)
    ratio = f"n/(n-1) = {n}/{n - 1}"
    return Reason(f"{which} variance differs by {ratio}: {a} against {b}", set())


def _epsilon(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    a, b = candidate.normalization, reference.normalization
    if a is None or b is None or a.epsilon == b.epsilon:
        return []
    return [Reason(f"epsilon {_short(a.epsilon)} against {_short(b.epsilon)}", set())]


def _short(epsilon: float) -> str:
    """The number as it is written in code: 1e-3, and 0.25."""
    if epsilon == 0 or 0.01 <= epsilon < 1e4:
        return f"{epsilon:g}"
    digits, exponent = f"{epsilon:.5e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def _parameters(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    a, b = candidate.normalization, reference.normalization
    if a is None or b is None:
        return []
    tolerance = max(candidate.tolerance, reference.tolerance)
    reasons = []
    largest = np.abs(b.scale).max() or 1.0
    # The mean's own rounding, of as many deviations, tilts the bias.
    far = np.max([np.where(np.isfinite(batch.far), batch.far, 0) for batch in batches], 0)
    unit = last_place_of_one(reference.trace.steps[0].y.dtype)
    slack = tolerance * max(largest, np.abs(b.bias).max()) + LAST_PLACES * unit * far * largest
    near = ~prone(batches, tolerance, unit)
    difference = np.abs(a.scale - b.scale)[near].max(initial=0)
    if difference > SLACK * tolerance * largest:
        reasons.append(Reason(f"scale differs: by up to {difference:.3g}", set()))
    # The output of a constant feature is its bias, and rounding that is divided by sqrt(epsilon).
    varies = np.all([batch.var > 0 for batch in batches], 0)
    if np.any((np.abs(a.bias - b.bias) > slack)[varies]):
        difference = np.abs(a.bias - b.bias)[varies].max()
        reasons.append(Reason(f"bias differs: by up to {difference:.3g}", set()))
    return reasons


def _other_start(candidate: Trace, reference: Trace, rtol: float) -> list[Reason]:
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


_FINDERS = (_momentum, _running_variance, _batch_variance, _epsilon, _parameters, *FINDERS)
