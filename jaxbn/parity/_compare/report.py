"""Hold the result of a comparison: one row per quantity, and a readable text."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# A longer table shows only the rows that differ or, if none does, the largest of each stage.
_MAX_ROWS = 60


class Row(NamedTuple):
    """The largest error of one quantity.

    Attributes:
      stage: when it was measured: "step 2" for layers, "training forward" for networks.
      name: what was compared: "running var", or the name of an intermediate.
      relative: the largest difference divided by a magnitude of the reference. For layers, this is
        the largest magnitude of the feature, so that no feature hides another. For the gradients of
        their parameters, and for networks, it is that of the whole array. The error is infinite if
        shapes differ or values are not finite.
      ulp: the largest difference in units in the last place of the same magnitude, in the
        reference's dtype. Values near zero are often differences of larger values, so their errors
        are measured relative to those larger values.
      note: why the error could not be measured.
    """

    stage: str
    name: str
    relative: float
    ulp: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The differences between two layers or two networks.

    Attributes:
      rows: the errors, in the order in which the quantities are computed.
      rtol: the largest relative error that counts as equal.
      diagnosis: the reasons for the differences, as far as they are known.
      notes: what could not be compared, and what may explain a difference.
    """

    rows: tuple[Row, ...]
    rtol: float
    diagnosis: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def first_difference(self) -> Row | None:
        """The first row beyond `rtol`, or None."""
        return next((row for row in self.rows if self._beyond(row)), None)

    @property
    def ok(self) -> bool:
        """Whether every row is within `rtol`."""
        return self.first_difference is None

    def worst(self, n: int) -> tuple[Row, ...]:
        """Return the `n` rows with the largest relative errors, the largest first."""
        return tuple(sorted(self.rows, key=lambda row: -row.relative)[:n])

    def raise_if_different(self) -> None:
        """Raise an `AssertionError` with the whole report, unless every row is within `rtol`."""
        if not self.ok:
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold. Infinite errors become None."""

        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        rows = [
            {**row._asdict(), "relative": finite(row.relative), "ulp": finite(row.ulp)}
            for row in self.rows
        ]
        first = self.first_difference
        place = None if first is None else {"stage": first.stage, "name": first.name}
        return {
            "ok": self.ok,
            "rtol": self.rtol,
            "first_difference": place,
            "rows": rows,
            "diagnosis": list(self.diagnosis),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        first = self.first_difference
        if first is None:
            lines = [f"No relative difference exceeds {self.rtol:g}."]
        else:
            by = first.note or f"relative error {first.relative:.2g}, {first.ulp:.3g} ulp"
            lines = [
                f"The first difference is at {first.stage}, {first.name}: {by} "
                f"(rtol {self.rtol:g})."
            ]
        lines += [f"- {reason}" for reason in self.diagnosis]
        lines += [f"({note})" for note in self.notes]
        return "\n".join([*lines, "", *self._table()])

    def _beyond(self, row: Row) -> bool:
        return not row.relative <= self.rtol

    def _table(self) -> list[str]:
        rows, title = self.rows, []
        if len(rows) > _MAX_ROWS and self.ok:
            rows, title = self._largest_of_each_stage(), ["The largest error of each stage:"]
        elif len(rows) > _MAX_ROWS:
            rows = [row for row in rows if self._beyond(row)]
        shown = rows[:_MAX_ROWS]
        cells = [("", "", "relative", "ulp", "")]
        for row in shown:
            mark = row.note or ("differs" if self._beyond(row) else "")
            cells.append((row.stage, row.name, f"{row.relative:.1e}", f"{row.ulp:.3g}", mark))
        table = [*title, *aligned(cells, "<<>><")]
        omitted = len(self.rows) - len(shown)
        return table if omitted == 0 else [*table, f"({omitted} rows omitted)"]

    def _largest_of_each_stage(self) -> list[Row]:
        largest: dict[str, Row] = {}
        for row in self.rows:
            if row.stage not in largest or row.relative > largest[row.stage].relative:
                largest[row.stage] = row
        return list(largest.values())


def aligned(cells: Sequence[Sequence[str]], alignments: str) -> list[str]:
    """Return a line for each row of a table, given `<` or `>` for each column."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, alignments, widths, strict=True)
        ).rstrip()
        for row in cells
    ]


def checked_rtol(rtol: Any) -> float:
    """Return `rtol` as a float, or raise if it is not a finite number of at least zero."""
    if isinstance(rtol, bool) or not isinstance(rtol, numbers.Real):
        raise TypeError(f"rtol must be a number, got {rtol!r} of type {type(rtol).__name__}.")
    value = float(rtol)
    if not 0 <= value < math.inf:
        raise ValueError(
            f"rtol is {value:g}; it must be finite and at least 0, such as 1e-5 for float32."
        )
    return value


def measure(
    stage: str,
    name: str,
    candidate: np.ndarray,
    reference: np.ndarray,
    magnitude: np.ndarray | None = None,
) -> Row:
    """Return the row of one quantity.

    Args:
      stage, name: see `Row`.
      candidate, reference: the two arrays.
      magnitude: what errors are relative to; broadcasts against the arrays. By default, and
        wherever it is zero, it is the largest magnitude of the reference, or one if that is zero.
    """
    candidate, reference = np.asarray(candidate), np.asarray(reference)
    if candidate.shape != reference.shape:
        note = f"shape {candidate.shape} against {reference.shape}"
        return Row(stage, name, math.inf, math.inf, note)
    dtype = reference.dtype
    a, b = candidate.astype(np.float64), reference.astype(np.float64)
    broken = [who for who, v in (("candidate", a), ("reference", b)) if not np.all(np.isfinite(v))]
    if broken:
        return Row(stage, name, math.inf, math.inf, f"not finite: {' and '.join(broken)}")
    largest = float(np.abs(b).max(initial=0)) or 1.0
    if magnitude is None:
        magnitude = np.full(1, largest)
    magnitude = np.where(magnitude > 0, magnitude, largest)
    last_place = last_place_of_one(dtype) * 2.0 ** np.floor(np.log2(magnitude))
    relative, ulp = (float((np.abs(a - b) / one).max(initial=0)) for one in (magnitude, last_place))
    return Row(stage, name, relative, ulp)


def last_place_of_one(dtype: np.dtype) -> float:
    """Return the distance from one to the next larger number of a dtype."""
    return float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float64).eps)
