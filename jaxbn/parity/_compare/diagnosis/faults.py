"""Find faults of one layer alone: another axis, constant statistics, the wrong statistics."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxbn.parity._compare.diagnosis.evidence import (
    OUTPUTS,
    ROLES,
    RUNNING,
    SLACK,
    Evidence,
    Finder,
    Reason,
)
from jaxbn.parity._compare.diagnosis.fits import fit_running, slope
from jaxbn.parity._compare.recording import Batch
from jaxbn.parity._compare.report import measure


def _only_one(
    test: Callable[[Evidence, Sequence[Batch]], bool], text: str, explains: set[str]
) -> Finder:
    """Make a finder for a fault that explains a difference if only one layer has it."""

    def find(candidate: Evidence, reference: Evidence, batches: Sequence[Batch]) -> list[Reason]:
        found = [test(layer, batches) for layer in (candidate, reference)]
        if found[0] == found[1]:
            return []
        return [Reason(f"{text} ({ROLES[0 if found[0] else 1]})", explains)]

    return find


def _close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    return measure("", "", a, b).relative <= tolerance


def evaluates_with_batch_statistics(layer: Evidence, batches: Sequence[Batch]) -> bool:
    same = all(_close(s.evaluation, s.y, layer.tolerance) for s in layer.recording.steps)
    return (
        same
        and _running_statistics_would_show(layer, batches)
        and not _normalizes_examples(layer, batches)
    )


def _running_statistics_would_show(layer: Evidence, batches: Sequence[Batch]) -> bool:
    """Return whether evaluation with the running statistics would differ from training.

    It would not if the scale is zero, or if the running statistics equal those of the batch.
    """
    epsilon = 1e-5 if layer.normalization is None else layer.normalization.epsilon
    for batch, step in zip(batches, layer.recording.steps, strict=True):
        if step.mean.shape != batch.mean.shape or step.var.shape != batch.var.shape:
            return True
        y = step.y.astype(np.float64)
        ratio = np.sqrt((batch.var + epsilon) / np.maximum(step.var + epsilon, epsilon))
        expected = slope(batch, y) * ratio * (batch.x - step.mean) + y.mean(0)
        if not _close(expected, y, SLACK * layer.tolerance):
            return True
    return False


def _scale_is_zero(layer: Evidence, batches: Sequence[Batch]) -> bool:
    # The output of a constant feature is constant at any scale.
    varies = any(np.any(batch.var > 0) for batch in batches)
    return varies and all(np.all(step.y == step.y[0]) for step in layer.recording.steps)


def _statistics_are_constants(layer: Evidence, batches: Sequence[Batch]) -> bool:
    return _gradients_are(layer, batches, lambda batch: batch.dy)


def _variance_is_constant(layer: Evidence, batches: Sequence[Batch]) -> bool:
    return _gradients_are(layer, batches, lambda batch: batch.dy - batch.dy.mean(0))


def _gradients_are(
    layer: Evidence, batches: Sequence[Batch], expected: Callable[[Batch], np.ndarray]
) -> bool:
    """Return whether `dx` is the slope times `expected`, and the slope is not zero everywhere."""
    slopes = [slope(batch, s.y) for batch, s in zip(batches, layer.recording.steps, strict=True)]
    return any(np.any(one != 0) for one in slopes) and all(
        "x" in step.gradients
        and _close(step.gradients["x"], one * expected(batch), SLACK * layer.tolerance)
        for one, batch, step in zip(slopes, batches, layer.recording.steps, strict=True)
    )


def _normalizes_examples(layer: Evidence, batches: Sequence[Batch]) -> bool:
    """Return whether `y` is linear, per feature, in `x` normalized per example, but not in `x`."""
    for batch, step in zip(batches, layer.recording.steps, strict=True):
        # A line fits four values too easily, and with one feature an example has no deviation.
        if min(batch.x.shape) < 2 or len(batch.x) < 5:
            return False
        y = step.y.astype(np.float64)
        largest = np.ptp(y, 0).max()
        # Any line fits outputs that do not depend on the input.
        if largest == 0:
            return False
        per_example = Batch.of(batch.x.T, batch.dy.T)
        x_hat = (per_example.centered / np.sqrt(per_example.var + 1e-5)).T
        errors = []
        for values in (batch.x.astype(np.float64), x_hat):
            line = Batch.of(values, batch.dy)
            residual = y - y.mean(0) - slope(line, y) * line.centered
            errors.append(np.abs(residual).max() / largest)
        # The layer's epsilon is unknown, so the fit to x_hat is not exact; that to x is far off.
        if errors[1] > 1e-2 or errors[1] * 10 > errors[0]:
            return False
    return True


def _averages_statistics_of_examples(layer: Evidence, batches: Sequence[Batch]) -> bool:
    per_example = [Batch.of(batch.x.T, batch.dy.T) for batch in batches]
    n, features = batches[0].x.shape
    if n != features or any(batch.x.shape != (n, features) for batch in batches):
        return False
    found = fit_running(layer.recording, per_example, layer.tolerance, np.ones(n, bool))
    return layer.running is None and found is not None


FAULT_FINDERS: tuple[Finder, ...] = (
    _only_one(_scale_is_zero, "the scale is zero", {"y", "dx", "evaluation y"}),
    _only_one(_normalizes_examples, "statistics of another axis: per example", OUTPUTS),
    _only_one(
        _averages_statistics_of_examples, "running statistics are those of another axis", RUNNING
    ),
    _only_one(
        evaluates_with_batch_statistics,
        "evaluation normalizes with the statistics of the batch",
        {"evaluation y"},
    ),
    _only_one(
        _statistics_are_constants, "the backward pass treats mean and variance as constants", {"dx"}
    ),
    _only_one(_variance_is_constant, "the backward pass treats the variance as a constant", {"dx"}),
)
