"""Two layers, the same batches: how far they part, and why."""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxbn.parity._diagnose import diagnose
from jaxbn.parity._fit import values
from jaxbn.parity._layer import DifferentiableLayer, Layer
from jaxbn.parity._report import Report, Row, checked_rtol, measure
from jaxbn.parity._trace import Batch, Step, Trace, checked, record


def compare(
    candidate: Layer, reference: Layer, batches: Iterable[np.ndarray], *, rtol: float = 1e-5
) -> Report:
    """Trains two layers on the same batches, and says how far they part and for which reason.

    For each batch: one training step, with the gradients of `sum(y * dy)` for a fixed random `dy`
    where both layers have `step`; the running statistics after it; the output in evaluation.
    Reasons are found from these numbers alone, and said only where they explain them. Layers with
    the same parameters and the same initial statistics are told apart best.

    Args:
      candidate: the layer in question. Training moves its statistics.
      reference: the layer that it should agree with. Likewise.
      batches: arrays of shape (N, C), float32 or float64, with one C. A few tens of rows tell more
        than thousands do, of features whose variances differ.
      rtol: the largest error, relative to the largest magnitude of the reference's quantity, that
        counts as none. The default is a hundred roundings in float32.

    Returns:
      A report with a row per step and quantity, and the diagnosis, which is empty where the layers
      agree.

    Raises:
      ValueError: no batch, or one that is not (N, C), not finite or has another C; a negative or
        infinite `rtol`, or NaN.
      TypeError: a batch, a layer or `rtol` of the wrong type.

    Example:
      >>> import numpy as np, jaxbn, jaxbn.parity
      >>> batches = np.random.default_rng(0).normal(1, 2, (2, 32, 4)).astype(np.float32)
      >>> params, state = jaxbn.init((1, 4))
      >>> keras, ours = (
      ...     jaxbn.parity.from_batch_norm(params, state, **convention)
      ...     for convention in (jaxbn.KERAS, jaxbn.PYTORCH))
      >>> report = jaxbn.parity.compare(keras, ours, batches)
      >>> for words in report.diagnosis:
      ...     print(words)
      momentum 0.99 against 0.9
      running variance differs by n/(n-1) = 32/31: biased against unbiased
      epsilon 1e-3 against 1e-5
    """
    for name, layer in (("candidate", candidate), ("reference", reference)):
        if not isinstance(layer, Layer):
            raise TypeError(
                f"{name} must have the methods train, evaluate and running; got "
                f"{layer!r} of type {type(layer).__name__}."
            )
    rtol = checked_rtol(rtol)
    checked_batches = checked(batches)
    without = [
        name
        for name, layer in (("candidate", candidate), ("reference", reference))
        if not isinstance(layer, DifferentiableLayer)
    ]
    notes = []
    if without:
        who = f"the {without[0]} has no" if len(without) == 1 else "neither layer has a"
        notes.append(f"no gradients: {who} step")
    ours, theirs = (record(layer, checked_batches, not without) for layer in (candidate, reference))
    rows, notes_on_rows = _rows(ours, theirs, checked_batches)
    diagnosis = diagnose(ours, theirs, checked_batches, rows, rtol)
    return Report(tuple(rows), rtol, diagnosis, (*notes, *notes_on_rows))


def assert_parity(
    candidate: Layer, reference: Layer, batches: Iterable[np.ndarray], *, rtol: float = 1e-5
) -> None:
    """Raises an `AssertionError` with the report of `compare`, unless the layers agree.

    Two networks: `compare_models(...).raise_if_parted()`.

    Args:
      candidate: see `compare`.
      reference: see `compare`.
      batches: see `compare`.
      rtol: see `compare`.

    Raises:
      AssertionError: the layers part by more than `rtol`; its message is the whole report.
      ValueError, TypeError: as `compare` does.

    Example:
      >>> import numpy as np, jaxbn, jaxbn.parity
      >>> layers = [jaxbn.parity.from_batch_norm(*jaxbn.init((1, 3))) for _ in range(2)]
      >>> x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
      >>> jaxbn.parity.assert_parity(*layers, [x])
    """
    compare(candidate, reference, batches, rtol=rtol).raise_if_parted()


def _rows(ours: Trace, theirs: Trace, batches: Sequence[Batch]) -> tuple[list[Row], list[str]]:
    rows = [
        measure("start", "running mean", ours.mean, theirs.mean),
        measure("start", "running var", ours.var, theirs.var),
    ]
    notes = {}
    for i, (a, b) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        left, right, units = values(a), values(b), _units(b, batches[i])
        rows += [
            measure(f"step {i + 1}", name, left[name], right[name], units.get(name))
            for name in left
            if name in right
        ]
        for who, has, lacks in (("candidate", left, right), ("reference", right, left)):
            notes |= {f"{name}: only the {who} has it": None for name in has if name not in lacks}
    return rows, list(notes)


def _units(step: Step, batch: Batch) -> dict[str, np.ndarray]:
    """What errors are relative to, per feature, of the quantities that features scale."""
    features = batch.mean.shape
    if any(v.shape != features for v in (step.mean, step.var)) or step.y.shape != batch.x.shape:
        return {}
    spread = np.ptp(batch.x.astype(np.float64), 0)
    units = {
        "y": np.abs(step.y).max(0),
        "running mean": np.maximum(np.abs(step.mean), spread),
        "running var": np.abs(step.var),
        "evaluation y": np.abs(step.evaluation).max(0),
    }
    # A gradient is a difference of terms of this size.
    slope = np.zeros(features)
    np.divide(np.ptp(step.y.astype(np.float64), 0), spread, out=slope, where=spread > 0)
    units["dx"] = slope * np.abs(batch.dy).max(0)
    # What is left of a constant feature is rounding, which has no magnitude of its own.
    return {name: np.where(spread > 0, unit, 0) for name, unit in units.items()}
