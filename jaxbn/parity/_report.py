"""What a comparison found: a row per quantity, and a text to read."""

import math
import numbers
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# A table that is longer shows only the rows that part.
_ROWS_SHOWN = 60


class Row(NamedTuple):
    """The largest error of one quantity.

    Attributes:
      stage: where it was taken: "step 2" of two layers, "training forward" of two networks.
      name: what was compared: "running var", or the name of an intermediate.
      relative: the largest difference over the largest magnitude of the reference: of two layers,
        that of the feature, so that none hides another, and of their parameters' gradients and of
        networks, that of the whole array. Infinite where shapes differ or values are not finite.
      ulp: the largest difference in units in the last place, in the reference's dtype, of the same
        magnitude: a value near zero, which is often a difference of larger ones, counts for no more
        than they do.
      note: why it could not be measured.
    """

    stage: str
    name: str
    relative: float
    ulp: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """Two layers, or two networks, side by side.

    Attributes:
      rows: the errors, in the order in which the quantities are computed.
      rtol: the largest relative error at which they count as equal.
      diagnosis: where they part, for which known reasons.
      notes: what could not be compared.
    """

    rows: tuple[Row, ...]
    rtol: float
    diagnosis: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parted(self) -> Row | None:
        """The first row beyond `rtol`, or None."""
        return next((row for row in self.rows if self._beyond(row)), None)

    @property
    def ok(self) -> bool:
        """Whether every row is within `rtol`."""
        return self.parted is None

    def raise_if_parted(self) -> None:
        """Raises an `AssertionError` that holds the whole report, unless all is within `rtol`."""
        if not self.ok:
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """The report in values that JSON has; None is an error that could not be measured."""

        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        rows = [
            {**row._asdict(), "relative": finite(row.relative), "ulp": finite(row.ulp)}
            for row in self.rows
        ]
        first = self.parted
        return {
            "ok": self.ok,
            "rtol": self.rtol,
            "first_parted": None if first is None else {"stage": first.stage, "name": first.name},
            "rows": rows,
            "diagnosis": list(self.diagnosis),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        first = self.parted
        if first is None:
            lines = [f"No difference beyond {self.rtol:g}, relative."]
        else:
            by = first.note or f"{first.relative:.2g} relative, {first.ulp:.3g} ulp"
            lines = [
                f"They part at {first.stage}, {first.name}: {by}; {self.rtol:g} relative allowed."
            ]
        lines += [f"- {words}" for words in self.diagnosis]
        lines += [f"({note})" for note in self.notes]
        return "\n".join([*lines, "", *self._table()])

    def _beyond(self, row: Row) -> bool:
        return not row.relative <= self.rtol

    def _table(self) -> list[str]:
        rows = [row for row in self.rows if len(self.rows) <= _ROWS_SHOWN or self._beyond(row)]
        shown = rows[:_ROWS_SHOWN]
        cells = [("", "", "relative", "ulp", "")]
        for row in shown:
            mark = row.note or ("beyond" if self._beyond(row) else "")
            cells.append((row.stage, row.name, f"{row.relative:.1e}", f"{row.ulp:.3g}", mark))
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        table = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in cells
        ]
        left_out = len(self.rows) - len(shown)
        return table if left_out == 0 else [*table, f"({left_out} rows left out)"]


def checked_rtol(rtol: Any) -> float:
    """`rtol`, or an error where nothing or everything would be within it."""
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
    unit: np.ndarray | None = None,
) -> Row:
    """The row of one quantity.

    Errors are relative to the `unit`, which broadcasts against it. By default, and where that is
    zero, it is the reference's largest magnitude; and one, where that is zero too.
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
    unit = np.full(1, largest) if unit is None else np.where(unit > 0, unit, largest)
    last_place = last_place_of_one(dtype) * 2.0 ** np.floor(np.log2(unit))
    relative, ulp = (float((np.abs(a - b) / one).max(initial=0)) for one in (unit, last_place))
    return Row(stage, name, relative, ulp)


def last_place_of_one(dtype: np.dtype) -> float:
    """The distance from one to the next number of a dtype."""
    return float(jnp.finfo(dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.float64).eps)
