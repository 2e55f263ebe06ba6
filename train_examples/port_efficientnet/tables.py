"""The tables of the report."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from train_examples.port_efficientnet.compare import Errors
from train_examples.port_efficientnet.fine_tune import Trained, difference
from train_examples.port_efficientnet.identify import Convention
from train_examples.port_efficientnet.photographs import CLASSES


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


def of_differences(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table with a row for each stage and a column for each dtype."""
    table = _table("Largest differences of both frameworks", ["", *columns])
    for stage in next(iter(columns.values())):
        table.add_row(stage, *(f"{stages[stage]:.0e}" for stages in columns.values()))
    return table


def of_errors(errors: Mapping[str, Errors]) -> Table:
    """Return a table of the intermediates with the largest errors, and of the output."""
    title = "Errors of each framework's float32 in a training step, against its own float64"
    table = _table(title, ["", "PyTorch", "jaxbn", "ratio"])
    worst = sorted(errors, key=lambda name: max(errors[name]))[-5:]
    for name in (*reversed(worst), list(errors)[-1]):
        theirs, ours = errors[name]
        table.add_row(name, f"{theirs:.1e}", f"{ours:.1e}", f"{theirs / ours:.1f}")
    return table


def of_losses(runs: Mapping[str, tuple[Trained, Trained]]) -> Table:
    """Return a table of the losses before each step, and of what differs after the last one."""
    frameworks = ("PyTorch", "jaxbn")
    columns = [f"{name},\n{framework}" for name in runs for framework in frameworks]
    table = _table("Fine-tuning in float64: the loss before each step", ["step", *columns])
    losses = [trained.losses for pair in runs.values() for trained in pair]
    for step, row in enumerate(zip(*losses, strict=True), 1):
        table.add_row(str(step), *(f"{loss:.6f}" for loss in row))
    afterwards = (f"{difference(*pair):.0e} with {name} batch norms" for name, pair in runs.items())
    table.caption = f"differences of variables after the last step: {', '.join(afterwards)}"
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
