"""Draw the means of each layer in units of its standard deviations."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxbn._palette import COLORS, DPI
from jaxbn.health._command.judge import standardized_means
from jaxbn.health._command.layers import Layer

_SOUND, _FAULTY = COLORS[:2]
# In standard deviations. Beyond this, the axis is logarithmic if any mean is twice as far.
_LINEAR = 3.0
# Larger numbers are clipped to this, since they would overflow in Matplotlib.
_FARTHEST = 1e300
# In inches. Rows shrink if there are too many layers for the largest height.
_ROW, _HIGHEST, _MARGINS = 0.2, 80.0, 1.3
_WIDTH, _LETTER = 7.5, 0.06


def draw_picture(
    layers: Sequence[Layer],
    found: Sequence[str],
    path: Path,
    *,
    title: str,
    epsilon: float,
) -> None:
    """Draw a row for each layer, with percentiles over its features. Needs Matplotlib.

    Args:
      layers: the layers, from top to bottom.
      found: the faults of each layer, in a few words; empty if it has none.
      path: the file to write; its ending determines the format.
      title: the title above the picture.
      epsilon: the epsilon that is added to the variances.
    """
    from matplotlib.figure import Figure

    n = len(layers)
    row = min(_ROW, _HIGHEST / n)
    width = _WIDTH + _LETTER * max(len(layer.path) for layer in layers)
    figure = Figure(figsize=(width, n * row + _MARGINS), layout="constrained")
    axes = figure.subplots()
    largest = 0.0
    for k, (layer, fault) in enumerate(zip(layers, found, strict=True)):
        values = np.clip(standardized_means(layer, epsilon), -_FARTHEST, _FARTHEST)
        colour = _FAULTY if fault else _SOUND
        if not values.size:
            axes.plot(0, k, "x", color=colour, ms=6)
            continue
        least, low, median, high, most = np.percentile(values, [0, 25, 50, 75, 100])
        largest = max(largest, abs(least), abs(most))
        axes.plot([least, most], [k, k], color=colour, lw=1)
        axes.barh(k, high - low, left=low, height=0.6, color=colour, alpha=0.5)
        axes.plot(median, k, "|", color=colour, ms=7, mew=2)
    reach = max(1.0, 1.1 * largest)
    axes.set_xlim(-reach, reach)
    if largest > 2 * _LINEAR:
        axes.set_xscale("symlog", linthresh=_LINEAR)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(0, color="0.7", lw=0.8, zorder=0)
    axes.grid(axis="x", color="0.9", lw=0.6)
    axes.set_axisbelow(True)
    size = min(8.0, row * 72 * 0.6)
    # Do not parse dollar signs in names as mathematics.
    literal = {"fontsize": size, "parse_math": False}
    axes.set_yticks(range(n), [layer.path for layer in layers], **literal)
    axes.set_ylim(n - 0.4, -0.6)
    notes = axes.secondary_yaxis("right")
    notes.set_yticks(range(n), found, **literal, color=_FAULTY)
    notes.tick_params(length=0)
    axes.set_xlabel(
        f"running mean / sqrt(running variance + {epsilon:g}), over the features of each layer:\n"
        "line: all; box: middle half; tick: median; x: no finite values"
    )
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=DPI)
