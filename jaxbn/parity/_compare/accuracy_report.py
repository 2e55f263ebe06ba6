"""Hold the errors of two networks: one row per quantity, and a readable text."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxbn.parity._compare.report import aligned


class AccuracyRow(NamedTuple):
    """The errors of one quantity, each the largest one relative to the array's largest magnitude.

    Attributes:
      stage: when it was measured, "training forward".
      name: the name of the intermediate in the candidate.
      difference: the difference between the two networks in float64.
      candidate_error: the difference of the candidate in float32 from itself in float64.
      reference_error: the difference of the reference in float32 from itself in float64.
    """

    stage: str
    name: str
    difference: float
    candidate_error: float
    reference_error: float

    @property
    def ratio(self) -> float:
        """The reference's error divided by the candidate's."""
        if self.candidate_error == 0:
            return 1.0 if self.reference_error == 0 else math.inf
        return self.reference_error / self.candidate_error


@dataclass(frozen=True)
class AccuracyReport:
    """The rounding errors of two networks.

    Attributes:
      rows: the errors, in the order in which the quantities are computed.
      notes: what could not be compared, and what may explain a difference.
    """

    rows: tuple[AccuracyRow, ...]
    notes: tuple[str, ...] = ()

    def worst(self, n: int) -> tuple[AccuracyRow, ...]:
        """Return the `n` rows with the largest error of either network, the largest first."""
        return tuple(
            sorted(self.rows, key=lambda row: -max(row.candidate_error, row.reference_error))[:n]
        )

    def largest(self) -> dict[str, AccuracyRow]:
        """Return, for each stage, a row with the largest of each of its numbers."""
        largest: dict[str, AccuracyRow] = {}
        for row in self.rows:
            before = largest.get(row.stage, row)
            errors = (max(pair) for pair in zip(row[2:], before[2:], strict=True))
            largest[row.stage] = AccuracyRow(row.stage, "(largest)", *errors)
        return largest

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold. Infinite errors become None."""
        return {
            "rows": [
                {
                    name: value if isinstance(value, str) or math.isfinite(value) else None
                    for name, value in {**row._asdict(), "ratio": row.ratio}.items()
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [
            ("", "", "float64", "float32 error", "float32 error", "reference"),
            ("", "", "difference", "of candidate", "of reference", "/ candidate"),
        ]
        for row in (*self.rows, *self.largest().values()):
            errors = (f"{error:.1e}" for error in row[2:])
            cells.append((row.stage, row.name, *errors, f"{row.ratio:.2g}"))
        return "\n".join([*(f"({note})" for note in self.notes), *aligned(cells, "<<>>>>")])
