"""Collect the reasons why two layers differ. A reason is stated only if it explains the numbers."""

from collections.abc import Sequence

import numpy as np

from jaxbn.parity._compare.diagnosis.convention import CONVENTION_FINDERS, other_start
from jaxbn.parity._compare.diagnosis.evidence import (
    RUNNING,
    SLACK,
    Evidence,
    Reason,
    prone_to_cancellation,
)
from jaxbn.parity._compare.diagnosis.faults import FAULT_FINDERS
from jaxbn.parity._compare.diagnosis.fits import (
    fit_normalizations,
    fit_running,
    rounded_dtype,
    unexplained_quantities,
)
from jaxbn.parity._compare.diagnosis.precision import PRECISION_FINDERS
from jaxbn.parity._compare.recording import Batch, Recording
from jaxbn.parity._compare.report import Row

_FINDERS = (*CONVENTION_FINDERS, *FAULT_FINDERS, *PRECISION_FINDERS)


def diagnose(
    candidate: Recording,
    reference: Recording,
    batches: Sequence[Batch],
    rows: Sequence[Row],
    rtol: float,
) -> tuple[str, ...]:
    """Return the reasons for the rows beyond `rtol`, and the quantities without a reason."""
    # The first row of each quantity that differs.
    differing = {row.name: row for row in reversed(rows) if not row.relative <= rtol}
    if not differing:
        return ()
    reasons = _not_comparable(differing, batches)
    explained = set()
    # Outputs of another shape, or that are not finite, allow no further reasons.
    if not any(row.note and row.name in ("y", "evaluation y") for row in rows):
        evidence = _evidence((candidate, reference), batches, rtol)
        reasons += [reason for find in _FINDERS for reason in find(*evidence, batches)]
        reasons += other_start(candidate, reference, rtol)
        if reasons:
            # The fits predict these quantities of both layers, so their differences explain them.
            explained = set(differing).difference(*(one.unexplained for one in evidence))
    explained = explained.union(*(reason.explains for reason in reasons))
    texts = [reason.text for reason in reasons]
    unexplained = [name for name in dict.fromkeys(row.name for row in rows) if name in differing]
    unexplained = [name for name in unexplained if name not in explained]
    if unexplained:
        texts.append(f"no known reason: {', '.join(unexplained)}")
    return tuple(texts)


def _evidence(
    recordings: tuple[Recording, Recording], batches: Sequence[Batch], rtol: float
) -> tuple[Evidence, Evidence]:
    """Fit a convention to each layer."""
    roundings = [rounded_dtype(recording) for recording in recordings]
    tolerances = [max(rtol, last_place) for _, last_place in roundings]
    every = np.ones(batches[0].mean.shape, bool)
    accurate = ~prone_to_cancellation(batches, rtol, roundings[1][1])
    normalizations = None
    for features in (every, accurate):
        normalizations = normalizations or fit_normalizations(
            recordings, batches, max(tolerances), max(place for _, place in roundings), features
        )
    evidence = []
    for i, recording in enumerate(recordings):
        running = fit_running(recording, batches, rtol, every)
        if running is None or not running.estimators:
            running = fit_running(recording, batches, rtol, accurate) or running
        normalization = None if normalizations is None else normalizations[i]
        unexplained = unexplained_quantities(
            recording, batches, running, normalization, SLACK * tolerances[i]
        )
        evidence.append(
            Evidence(recording, tolerances[i], roundings[i][0], running, normalization, unexplained)
        )
    return evidence[0], evidence[1]


def _not_comparable(differing: dict[str, Row], batches: Sequence[Batch]) -> list[Reason]:
    """Give reasons for quantities of different shapes, or with values that are not finite."""
    reasons = []
    running = [row for name, row in differing.items() if name in RUNNING and "shape" in row.note]
    if running:
        n, features = batches[0].x.shape
        shape = running[0].note
        text = f"running statistics have {shape}"
        if f"({n},)" in shape and n != features:
            text = f"statistics of another axis: running statistics have {shape}"
        reasons.append(Reason(text, {row.name for row in running}))
    for name, row in differing.items():
        if row.note and row not in running:
            reasons.append(Reason(f"{name} at {row.stage}: {row.note}", {name}))
    return reasons
