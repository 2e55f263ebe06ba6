"""The tables of the report."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from jaxbn.parity import AccuracyReport
from train_examples.port_efficientnet.identify import Convention
from train_examples.port_efficientnet.photographs import CLASSES, OF_IMAGENET
from train_examples.port_efficientnet.recalibrate import Agreement


def of_conventions(conventions: Counter[Convention]) -> Table:
    """Return a table with a row for each convention that batch norms follow."""
    names = [name for name, _ in next(iter(conventions))]
    table = _table("Conventions that the batch norms follow", ["batch norms", *names])
    for convention, number in conventions.items():
        table.add_row(str(number), *(str(value) for _, value in convention))
    return table


def of_classes(photographs: Sequence[str], theirs: np.ndarray, ours: np.ndarray) -> Table:
    """Return a table of the probable class of each photograph, from probabilities."""
    columns = ["photograph", "PyTorch", "jaxbn", "probability", "difference"]
    table = _table("Classes of real photographs", columns)
    for name, p, q in zip(photographs, theirs, ours, strict=True):
        classes = (CLASSES.get(k, str(k)) for k in (int(p.argmax()), int(q.argmax())))
        table.add_row(name, *classes, f"{p.max():.3f}", f"{np.abs(p - q).max():.0e}")
    return table


def of_accuracy(report: AccuracyReport) -> Table:
    """Return a table of the largest errors in each stage, and of where the worst are."""
    columns = ["", "float64\ndifference", "float32 error\nof PyTorch", "float32 error\nof jaxbn"]
    table = _table("Differences and errors, relative to the largest value of each array", columns)
    for stage, row in report.largest().items():
        numbers = row.difference, row.reference_error, row.candidate_error
        table.add_row(stage, *(f"{number:.0e}" for number in numbers))
    table.caption = "errors: of each framework, against its own results in float64"
    return table


def of_agreements(agreements: Mapping[str, Agreement], photographs: int) -> Table:
    """Return a table of how many darkened photographs keep their class."""
    title = "Photographs in a sixteenth of the light that keep their class"
    table = _table(title, ["statistics", "all", "of those with an ImageNet class"])
    numbers = photographs, min(photographs, OF_IMAGENET)
    for name, agreement in agreements.items():
        pairs = zip(agreement, numbers, strict=True)
        table.add_row(name, *(f"{kept} of {number}" for kept, number in pairs))
    return table


def of_losses(
    losses: Mapping[str, tuple[Sequence[float], Sequence[float]]], differences: Mapping[str, float]
) -> Table:
    """Return a table of the losses before each step, and of what differs after the last one."""
    columns = [f"{name},\n{framework}" for name in losses for framework in ("PyTorch", "jaxbn")]
    table = _table("Fine-tuning in float64: the loss before each step", ["step", *columns])
    rows = zip(*(losses_of_one for pair in losses.values() for losses_of_one in pair), strict=True)
    for step, row in enumerate(rows, 1):
        table.add_row(str(step), *(f"{loss:.6f}" for loss in row))
    afterwards = (f"{d:.0e} with {name} batch norms" for name, d in differences.items())
    table.caption = f"variables differ after the last step by {' and '.join(afterwards)}"
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
