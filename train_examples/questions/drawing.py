"""Tables in Markdown, and plots with the spread over the seeds."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from train_examples.common.plots import COLORS

MARKERS = ("o", "s", "^", "D")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table that prints as Markdown."""
    result = Table(title=title, title_justify="left", box=box.MARKDOWN)
    for number, column in enumerate(columns):
        result.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels in a row, and their axes."""
    figure = Figure(figsize=(9 if count > 2 else 8, 3.8), layout="constrained")
    axes = list(np.atleast_1d(np.asarray(figure.subplots(1, count))))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.tick_params(labelsize=8)
    return figure, axes


def band(ax: Axes, x: Sequence[float], values: np.ndarray, number: int, label: str) -> None:
    """Draw the mean over the seeds as a line, and the range from smallest to largest as a band.

    `values` has the shape (len(x), seeds).
    """
    color = COLORS[number]
    ax.plot(x, values.mean(1), MARKERS[number] + "-", color=color, label=label, markersize=4)
    ax.fill_between(x, values.min(1), values.max(1), color=color, alpha=0.2, linewidth=0)


def legend_below(ax: Axes) -> None:
    """Draw the legend below the axes, where it covers no data."""
    ax.legend(
        frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), borderpad=0
    )
