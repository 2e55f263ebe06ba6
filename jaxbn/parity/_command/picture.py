"""Draw the measured errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn._palette import COLORS, DPI
from jaxbn.parity._command.measurements import INPUTS, KEYWORDS, RESULTS
from jaxbn.parity._command.tables import keyword_values

_EXACT, _NOT_A_NUMBER = 1e-9, 1e7
# Shapes distinguish the other layers where colours are printed in gray.
_MARKERS = "osD^vP<"


def draw_picture(measured: Mapping[str, Any], path: Path) -> None:
    """Draw the errors, with a panel per result and a colour per layer. Needs Matplotlib."""
    from matplotlib.figure import Figure

    known = {t: errors for t, errors in measured["errors"].items() if errors is not None}
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    figure.suptitle(
        f"Largest error in {measured['dtype']} on hard inputs, over the largest value", fontsize=11
    )
    axes = figure.subplots(1, len(RESULTS), sharey=True)
    for at, result in zip(axes, RESULTS, strict=True):
        for k, (title, by_input) in enumerate(known.items()):
            errors = [by_input[name][result] for name in INPUTS]
            # Zero and NaN are drawn at the ends of the logarithmic axis.
            places = [_NOT_A_NUMBER if e is None else max(e, _EXACT) for e in errors]
            keywords = keyword_values(measured["conventions"][title])
            at.plot(
                places,
                np.arange(len(INPUTS)) + (k - (len(known) - 1) / 2) * 0.1,
                label=f"{title}: {', '.join(keywords)}",
                **_style(k),
            )
        # Between the inputs.
        for line in np.arange(len(INPUTS) - 1) + 0.5:
            at.axhline(line, color="0.85", lw=0.6, zorder=0)
        at.set(xscale="log", title=result, xlim=(_EXACT / 5, _NOT_A_NUMBER * 5))
        at.set_ylim(len(INPUTS) - 0.5, -0.5)
        ticks = {_EXACT: "exact", 1e-6: "1e-6", 1e-3: "1e-3", 1: "1", _NOT_A_NUMBER: "nan"}
        at.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
        at.minorticks_off()
        at.spines[["top", "right"]].set_visible(False)
        at.tick_params(axis="y", length=0)
        at.set_yticks(range(len(INPUTS)), INPUTS)
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2,
        fontsize=8.5,
        frameon=False,
        title=f"layer: {', '.join(KEYWORDS)}",
        title_fontsize=8.5,
    )
    # This library comes first.
    legend.get_texts()[0].set_fontweight("bold")
    figure.savefig(path, dpi=DPI)


def _style(k: int) -> dict[str, Any]:
    """Return how to draw the `k`-th layer: the first, this library, stands out."""
    if k == 0:
        return {"color": COLORS[0], "marker": "o", "ls": "", "ms": 8, "zorder": 3}
    others = COLORS[1:]
    return {
        "color": others[(k - 1) % len(others)],
        "marker": _MARKERS[k % len(_MARKERS)],
        "ls": "",
        "ms": 4.5,
        "alpha": 0.9,
    }
