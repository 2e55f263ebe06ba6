"""Train two layers on the same batches, and report by how much they differ and why."""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxbn.parity._compare.diagnosis.diagnose import diagnose
from jaxbn.parity._compare.recording import Batch, Recording, Step, checked_batches, record
from jaxbn.parity._compare.report import Report, Row, checked_rtol, measure
from jaxbn.parity._layer import DifferentiableLayer, Layer


def compare(
    candidate: Layer, reference: Layer, batches: Iterable[np.ndarray], *, rtol: float = 1e-5
) -> Report:
    """Train two layers on the same batches, and report by how much they differ and why.

    For each batch, this compares one training step, the running statistics after it, and the output
    in evaluation. If both layers have `step`, it also compares the gradients of `sum(y * dy)` for a
    fixed random `dy`. The diagnosis uses these numbers alone, and states a reason only if it
    explains them. It works best if both layers have the same parameters and initial statistics.

    Args:
      candidate: the layer to check. Training changes its statistics.
      reference: the layer that it should agree with. Training changes its statistics, too.
      batches: arrays of shape (N, C), float32 or float64, all with the same C. A few tens of rows,
        of features with different variances, show more than thousands of rows do.
      rtol: the largest relative error that counts as equal. Errors are relative to the largest
        magnitude of the reference's quantity. The default is a hundred roundings in float32.

    Returns:
      A report with a row per step and quantity, and the diagnosis, which is empty if the layers
      agree.

    Raises:
      ValueError: there is no batch; a batch is not (N, C), is not finite or has another C; or
        `rtol` is negative, infinite or NaN.
      TypeError: a batch, a layer or `rtol` has the wrong type.

    Example:
      >>> import numpy as np, jaxbn, jaxbn.parity
      >>> batches = np.random.default_rng(0).normal(1, 2, (2, 32, 4)).astype(np.float32)
      >>> params, state = jaxbn.init((1, 4))
      >>> keras, ours = (
      ...     jaxbn.parity.batch_norm_layer(params, state, **convention)
      ...     for convention in (jaxbn.KERAS, jaxbn.PYTORCH))
      >>> report = jaxbn.parity.compare(keras, ours, batches)
      >>> for reason in report.diagnosis:
      ...     print(reason)
      momentum 0.99 against 0.9
      running variance differs by n/(n-1) = 32/31: biased against unbiased
      epsilon 1e-3 against 1e-5
    """
    layers = {"candidate": candidate, "reference": reference}
    for name, layer in layers.items():
        if not isinstance(layer, Layer):
            raise TypeError(
                f"{name} must have the methods train, evaluate and running; got "
                f"{layer!r} of type {type(layer).__name__}."
            )
    rtol = checked_rtol(rtol)
    with_cotangents = checked_batches(batches)
    without = [name for name, layer in layers.items() if not isinstance(layer, DifferentiableLayer)]
    notes = []
    if without:
        who = f"the {without[0]} has no" if len(without) == 1 else "neither layer has a"
        notes.append(f"no gradients: {who} step")
    ours, theirs = (record(layer, with_cotangents, not without) for layer in layers.values())
    rows, notes_on_rows = _rows(ours, theirs, with_cotangents)
    diagnosis = diagnose(ours, theirs, with_cotangents, rows, rtol)
    return Report(tuple(rows), rtol, diagnosis, (*notes, *notes_on_rows))


def assert_parity(
    candidate: Layer, reference: Layer, batches: Iterable[np.ndarray], *, rtol: float = 1e-5
) -> None:
    """Raise an `AssertionError` with the report of `compare`, unless the layers agree.

    For two networks, call `compare_models(...).raise_if_different()`.

    Args:
      candidate: see `compare`.
      reference: see `compare`.
      batches: see `compare`.
      rtol: see `compare`.

    Raises:
      AssertionError: the layers differ by more than `rtol`; the message is the whole report.
      ValueError, TypeError: see `compare`.

    Example:
      >>> import numpy as np, jaxbn, jaxbn.parity
      >>> layers = [jaxbn.parity.batch_norm_layer(*jaxbn.init((1, 3))) for _ in range(2)]
      >>> x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
      >>> jaxbn.parity.assert_parity(*layers, [x])
    """
    compare(candidate, reference, batches, rtol=rtol).raise_if_different()


def _rows(
    ours: Recording, theirs: Recording, batches: Sequence[Batch]
) -> tuple[list[Row], list[str]]:
    """Return a row per step and quantity, and what could not be compared."""
    rows = [
        measure("start", "running mean", ours.mean, theirs.mean),
        measure("start", "running var", ours.var, theirs.var),
    ]
    notes = {}
    for i, (a, b) in enumerate(zip(ours.steps, theirs.steps, strict=True)):
        left, right, magnitudes = a.quantities(), b.quantities(), _magnitudes(b, batches[i])
        rows += [
            measure(f"step {i + 1}", name, left[name], right[name], magnitudes.get(name))
            for name in left
            if name in right
        ]
        for who, has, lacks in (("candidate", left, right), ("reference", right, left)):
            notes |= {f"{name}: only the {who} has it": None for name in has if name not in lacks}
    return rows, list(notes)


def _magnitudes(step: Step, batch: Batch) -> dict[str, np.ndarray]:
    """Return, per feature, what errors of the quantities that scale with a feature are relative to.

    Other quantities have no entry: their errors are relative to the largest value of the array.
    """
    features = batch.mean.shape
    if any(v.shape != features for v in (step.mean, step.var)) or step.y.shape != batch.x.shape:
        return {}
    spread = np.ptp(batch.x.astype(np.float64), 0)
    magnitudes = {
        "y": np.abs(step.y).max(0),
        "running mean": np.maximum(np.abs(step.mean), spread),
        "running var": np.abs(step.var),
        "evaluation y": np.abs(step.evaluation).max(0),
    }
    # A gradient is a difference of terms of this size.
    slope = np.zeros(features)
    np.divide(np.ptp(step.y.astype(np.float64), 0), spread, out=slope, where=spread > 0)
    magnitudes["dx"] = slope * np.abs(batch.dy).max(0)
    # The results of a constant feature are rounding errors, which have no magnitude of their own.
    return {name: np.where(spread > 0, value, 0) for name, value in magnitudes.items()}
