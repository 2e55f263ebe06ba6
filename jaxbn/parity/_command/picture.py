"""Draw the measured errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxbn.parity._command.measurements import INPUTS, RESULTS
from jaxbn.parity._command.tables import keyword_values

_EXACT, _NOT_A_NUMBER = 1e-9, 1e7


def draw_picture(measured: Mapping[str, Any], path: Path) -> None:
    """Draw the errors, with a panel per result and a colour per layer. Needs Matplotlib."""
    from matplotlib.figure import Figure

    known = {t: errors for t, errors in measured["errors"].items() if errors is not None}
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, len(RESULTS), sharey=True)
    for at, result in zip(axes, RESULTS, strict=True):
        for k, (title, by_input) in enumerate(known.items()):
            errors = [by_input[name][result] for name in INPUTS]
            # Zero and NaN are drawn at the ends of the logarithmic axis.
            places = [_NOT_A_NUMBER if e is None else max(e, _EXACT) for e in errors]
            shift = (k - (len(known) - 1) / 2) * 0.1
            keywords = keyword_values(measured["conventions"][title])
            label = f"{title}: {', '.join(keywords)}"
            at.plot(places, np.arange(len(INPUTS)) + shift, "o", ms=4, label=label)
        at.set(xscale="log", title=result, xlabel="largest error")
        ticks = {_EXACT: "exact", 1e-6: "1e-6", 1e-3: "1e-3", 1: "1", _NOT_A_NUMBER: "nan"}
        at.set_xticks(list(ticks), list(ticks.values()))
        at.minorticks_off()
        at.set_yticks(range(len(INPUTS)), INPUTS)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
