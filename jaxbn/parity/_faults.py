"""What a layer may do beyond its convention: another axis, lost digits, missing gradients."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxbn.parity._fit import ESTIMATORS, Normalization, Running, fit_running, slope
from jaxbn.parity._report import measure
from jaxbn.parity._trace import Batch, Trace
from jaxbn.parity._trace import batch as make_batch

# What a fit leaves may be so many times the tolerance: fits average, rows take the largest.
SLACK = 10
# The rounding error of E[x^2] - E[x]^2 is about this many last places of mean squared.
LAST_PLACES = 8
SIDES = ("candidate", "reference")
RUNNING = {"running mean", "running var"}
_OUTPUTS = {"y", "dx", "dscale", "dbias", "evaluation y"}


class Seen(NamedTuple):
    """One layer: what it gave, and the fits to it."""

    trace: Trace
    tolerance: float
    narrow: str | None
    running: Running | None
    normalization: Normalization | None
    missed: set[str]


class Reason(NamedTuple):
    words: str
    explains: set[str]


def prone(batches: Sequence[Batch], rtol: float, unit: float) -> np.ndarray:
    """The features whose variance, computed carelessly, loses more than `rtol`."""
    return np.max([LAST_PLACES * unit * batch.far**2 for batch in batches], 0) > rtol


def _only_one(
    test: Callable[[Seen, Sequence[Batch]], bool], words: str, explains: set[str]
) -> Callable[[Seen, Seen, Sequence[Batch]], list[Reason]]:
    """A finder for what is a reason to part if one side does it and the other does not."""

    def find(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
        found = [test(side, batches) for side in (candidate, reference)]
        if found[0] == found[1]:
            return []
        return [Reason(f"{words} ({SIDES[0 if found[0] else 1]})", explains)]

    return find


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return measure("", "", a, b).relative <= tolerance


def _evaluates_with_the_batch(side: Seen, batches: Sequence[Batch]) -> bool:
    same = all(_close(s.evaluation, s.y, side.tolerance) for s in side.trace.steps)
    return same and _running_would_show(side, batches) and not _normalizes_examples(side, batches)


def _running_would_show(side: Seen, batches: Sequence[Batch]) -> bool:
    """Whether evaluation would differ from training, did it use the running statistics.

    It would not where the scale is zero, and where the running statistics are the batch's own.
    """
    epsilon = 1e-5 if side.normalization is None else side.normalization.epsilon
    for batch, step in zip(batches, side.trace.steps, strict=True):
        if step.mean.shape != batch.mean.shape or step.var.shape != batch.var.shape:
            return True
        y = step.y.astype(np.float64)
        ratio = np.sqrt((batch.var + epsilon) / np.maximum(step.var + epsilon, epsilon))
        expected = slope(batch, y) * ratio * (batch.x - step.mean) + y.mean(0)
        if not _close(expected, y, SLACK * side.tolerance):
            return True
    return False


def _scale_is_zero(side: Seen, batches: Sequence[Batch]) -> bool:
    # The output of a feature that is constant is constant at any scale.
    varies = any(np.any(batch.var > 0) for batch in batches)
    return varies and all(np.all(step.y == step.y[0]) for step in side.trace.steps)


def _statistics_are_constants(side: Seen, batches: Sequence[Batch]) -> bool:
    return _gradients_are(side, batches, lambda batch: batch.dy)


def _variance_is_constant(side: Seen, batches: Sequence[Batch]) -> bool:
    return _gradients_are(side, batches, lambda batch: batch.dy - batch.dy.mean(0))


def _gradients_are(
    side: Seen, batches: Sequence[Batch], expected: Callable[[Batch], np.ndarray]
) -> bool:
    """Whether `dx` is the slope times what is expected; not where the slope is zero everywhere."""
    slopes = [slope(batch, s.y) for batch, s in zip(batches, side.trace.steps, strict=True)]
    return any(np.any(one != 0) for one in slopes) and all(
        "x" in step.gradients
        and _close(step.gradients["x"], one * expected(batch), SLACK * side.tolerance)
        for one, batch, step in zip(slopes, batches, side.trace.steps, strict=True)
    )


def _normalizes_examples(side: Seen, batches: Sequence[Batch]) -> bool:
    """Whether `y` is a line, per feature, in `x` normalized per example and in nothing less."""
    for batch, step in zip(batches, side.trace.steps, strict=True):
        # With four values a line fits much; with one feature no example has a deviation.
        if min(batch.x.shape) < 2 or len(batch.x) < 5:
            return False
        y = step.y.astype(np.float64)
        largest = np.ptp(y, 0).max()
        # Any line fits outputs that do not depend on the input.
        if largest == 0:
            return False
        across = make_batch(batch.x.T, batch.dy.T)
        deviation = np.sqrt(across.var + 1e-5)
        errors = []
        for line in (batch.x.astype(np.float64), ((across.centered) / deviation).T):
            as_batch = make_batch(line, batch.dy)
            residual = y - y.mean(0) - slope(as_batch, y) * as_batch.centered
            errors.append(np.abs(residual).max() / largest)
        # Within its epsilon, which is not known, the line is exact; the other is far from one.
        if errors[1] > 1e-2 or errors[1] * 10 > errors[0]:
            return False
    return True


def _tracks_examples(side: Seen, batches: Sequence[Batch]) -> bool:
    across = [make_batch(batch.x.T, batch.dy.T) for batch in batches]
    n, features = batches[0].x.shape
    if n != features or any(batch.x.shape != (n, features) for batch in batches):
        return False
    found = fit_running(side.trace, across, side.tolerance, np.ones(n, bool))
    return side.running is None and found is not None


def _rounded(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    if candidate.narrow == reference.narrow:
        return []
    return [
        Reason(f"outputs are rounded to {side.narrow} ({who})", set())
        for who, side in zip(SIDES, (candidate, reference), strict=True)
        if side.narrow is not None
    ]


def _cancellation(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    """Whether a variance is off by what the rounding of `E[x^2]` makes it, and for whom."""
    worst = [_lost(side, batches) for side in (candidate, reference)]
    largest = max(loss for loss, _ in worst)
    if largest == 0:
        return []
    # Both may have lost something; who lost a hundredth of it is not the one that is off.
    who = [name for name, (loss, _) in zip(SIDES, worst, strict=True) if loss * 100 > largest]
    far = max(worst)[1]
    words = f"variance lost to cancellation: mean {far:.3g} deviations from zero"
    explains = _OUTPUTS - {"dbias"} | {"running var"}
    return [Reason(f"{words} ({' and '.join(who)})", explains)]


def _lost(side: Seen, batches: Sequence[Batch]) -> tuple[float, float]:
    """The largest relative error of a variance, and how far from zero it was; 0 where none is.

    The variance that a layer computed shows in its running variance, and in the ratio of its
    slopes in evaluation, where the variance is known, and in training.
    """
    unit = np.finfo(np.float32).eps
    fit = side.normalization
    estimators = ESTIMATORS if fit is None else (fit.estimator,)
    epsilons = (1e-5, 1e-3) if fit is None else (fit.epsilon,)
    losses = [(0.0, 0.0)]
    for i, (batch, step) in enumerate(zip(batches, side.trace.steps, strict=True)):
        old = side.trace.statistics()[i][1]
        if step.var.shape != batch.var.shape or np.any(step.var < 0):
            continue
        bound = LAST_PLACES * unit * batch.far**2
        candidates = (bound > SLACK * side.tolerance) & (batch.var > 0)
        if not candidates.any():
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            errors = []
            ratio = np.abs(slope(batch, step.evaluation) / slope(batch, step.y)) ** 2
            implied = [(step.var + e) * ratio - e for e in epsilons]
            errors.append(_least(implied, batch, estimators))
            if side.running is not None and side.running.weights[i] > 0:
                weight = side.running.weights[i]
                implied = [(step.var - (1 - weight) * old) / weight]
                noise = 4 * unit * np.maximum(old, step.var) / (weight * batch.var)
                error = _least(implied, batch, ESTIMATORS)
                errors.append(np.where(error > noise, error, 0))
        if _evaluates_with_the_batch(side, batches):
            errors = errors[1:]
        for error in errors:
            real = candidates & (error > SLACK * side.tolerance)
            # An error beyond what the rounding makes has another reason.
            if real.any() and np.all(error[real] <= bound[real]):
                c = np.argmax(np.where(real, error, 0))
                losses.append((float(error[c]), float(batch.far[c])))
    return max(losses)


def _least(implied: list[np.ndarray], batch: Batch, estimators: Sequence[str]) -> np.ndarray:
    errors = [np.abs(v - batch.variance(e)) / batch.var for v in implied for e in estimators]
    return np.nan_to_num(np.min(errors, 0), nan=0, posinf=0)


def _mean_rounding(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    """Whether outputs differ by what a mean far from zero is rounded by."""
    unit = np.finfo(np.float32).eps
    worst = 0.0
    for batch, a, b in zip(batches, candidate.trace.steps, reference.trace.steps, strict=True):
        for ours, theirs in ((a.y, b.y), (a.evaluation, b.evaluation)):
            difference = np.abs(ours.astype(np.float64) - theirs).max(0)
            deviation = np.abs(slope(batch, theirs)) * np.sqrt(batch.var)
            limit = candidate.tolerance * np.abs(theirs).max()
            off = (difference > limit) & (batch.var > 0)
            if np.any(difference[off] > LAST_PLACES * unit * batch.far[off] * deviation[off]):
                return []
            worst = max(worst, batch.far[off].max(initial=0))
    if worst == 0:
        return []
    return [Reason(f"rounding of the mean: {worst:.3g} deviations from zero", set(_OUTPUTS))]


def _constant_features(candidate: Seen, reference: Seen, batches: Sequence[Batch]) -> list[Reason]:
    """Whether outputs differ by no more than rounding, and only where a feature is constant."""
    steps = zip(batches, candidate.trace.steps, reference.trace.steps, strict=True)
    fits = [side.normalization for side in (candidate, reference)]
    # Where nothing tells scale and epsilon, the usual ones.
    known = [(np.abs(fit.scale).max(), fit.epsilon) for fit in fits if fit is not None]
    largest = max(scale / np.sqrt(max(epsilon, 1e-12)) for scale, epsilon in known or [(1, 1e-5)])
    unit = np.finfo(np.float32).eps
    found = False
    for batch, ours, theirs in steps:
        difference = np.abs(ours.y.astype(np.float64) - theirs.y).max(0)
        off = difference > candidate.tolerance * np.abs(theirs.y).max()
        rounding = LAST_PLACES * unit * np.abs(batch.mean) * largest
        if np.any(off & ((batch.var > 0) | (difference > rounding))):
            return []
        found |= bool(off.any())
    words = "features that are constant: their rounding is divided by sqrt(epsilon)"
    return [Reason(words, set(_OUTPUTS))] if found else []


FINDERS = (
    _only_one(_scale_is_zero, "the scale is zero", {"y", "dx", "evaluation y"}),
    _only_one(_normalizes_examples, "statistics of another axis: per example", _OUTPUTS),
    _only_one(_tracks_examples, "running statistics of another axis", RUNNING),
    _only_one(
        _evaluates_with_the_batch,
        "evaluation normalizes with the batch's statistics",
        {"evaluation y"},
    ),
    _only_one(
        _statistics_are_constants, "the backward pass treats mean and variance as constants", {"dx"}
    ),
    _only_one(_variance_is_constant, "the backward pass treats the variance as a constant", {"dx"}),
    _rounded,
    _cancellation,
    _mean_rounding,
    _constant_features,
)
