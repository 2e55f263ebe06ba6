"""Draw a picture of each section that has more than a handful of numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.targets import TARGETS

_EXACT, _NOT_A_NUMBER = 1e-9, 1e7


def speed(data: dict[str, Any], path: Path) -> None:
    """Plot our time over each contender's, a dot for each shape and a bar for their mean.

    The mean is geometric. Only the first kind of data is plotted.
    """
    first = next(iter(data["data"]))
    cases, summary = (
        [one for one in data[part] if one["data"] == first] for part in ("cases", "summary")
    )
    groups = list(dict.fromkeys((one["dtype"], one["layout"]) for one in summary))
    kinds = list(dict.fromkeys(one["pass"] for one in summary))
    names = [n for n in dict.fromkeys(one["contender"] for one in summary) if n != "ours"]
    figure, axes = plt.subplots(
        *(len(kinds), len(groups)),
        figsize=(3.2 * len(groups), 2.4 * len(kinds)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, kind in enumerate(kinds):
        for column, group in enumerate(groups):
            at = axes[row, column]
            for x, name in enumerate(names):
                key = (*group, kind, name)
                fields = ("dtype", "layout", "pass", "contender")
                dots, (mean,) = (
                    [o["ours_over_it"] for o in part if tuple(o[f] for f in fields) == key]
                    for part in (cases, summary)
                )
                at.plot([x] * len(dots), dots, "o", ms=3, alpha=0.5, color=f"C{x}")
                at.plot([x - 0.3, x + 0.3], [mean, mean], color=f"C{x}", lw=2)
            at.axhline(1, color="gray", lw=0.8, ls=":")
            at.set_title(f"{kind.replace('_', ' + ')}, {group[0]}, {group[1]}", fontsize=8)
            at.set_yscale("log")
            at.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    figure.supylabel(f"our time / theirs, data: {first}", fontsize=9)
    _save(figure, path)


def accuracy(data: dict[str, Any], path: Path) -> None:
    inputs = list(data["errors"])
    names = list(data["errors"][inputs[0]])
    fields = list(data["errors"][inputs[0]][names[0]])
    figure, axes = plt.subplots(
        1, len(fields), figsize=(4 * len(fields), 4), sharey=True, layout="constrained"
    )
    for at, field in zip(axes, fields, strict=True):
        for k, name in enumerate(names):
            errors = [data["errors"][i][name][field] for i in inputs]
            # Exact results and NaN are drawn at the ends of the logarithmic axis.
            places = [_NOT_A_NUMBER if e is None else max(e, _EXACT) for e in errors]
            shift = (k - (len(names) - 1) / 2) * 0.1
            at.plot(places, np.arange(len(inputs)) + shift, "o", ms=4, label=name)
        at.axvline(2.0**-24, color="gray", lw=0.8, ls=":")
        at.set(xscale="log", title=field, xlabel="largest error")
        ticks = {_EXACT: "exact", 1e-6: "1e-6", 1e-3: "1e-3", 1: "1", _NOT_A_NUMBER: "nan"}
        at.set_xticks(list(ticks), list(ticks.values()))
        at.minorticks_off()
        at.set_yticks(range(len(inputs)), inputs)
    axes[0].invert_yaxis()
    axes[-1].legend(frameon=False, fontsize=8)
    _save(figure, path)


def memory(data: dict[str, Any], path: Path) -> None:
    cases = data["cases"]
    labels = [f"{one['layer']}\n{one['dtype']}" for one in cases]
    colors = ["C0" if one["layer"] == "ours" else "C1" for one in cases]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.bar(labels, [one["kept_per_input_byte"] for one in cases], color=colors)
    left.set_ylabel("bytes kept per input byte", fontsize=9)
    temporaries = [(one["step_temporary_bytes"] or 0) / 1e6 for one in cases]
    right.bar(labels, temporaries, color=colors)
    right.set_ylabel("temporaries of a step, MB", fontsize=9)
    for at in (left, right):
        at.tick_params(labelsize=8)
    _save(figure, path)


def compiled(data: dict[str, Any], path: Path) -> None:
    """Plot the bytes that a layer and a ResNet's step read and write, by machine."""
    found = data["targets"]
    figure, axes = plt.subplots(
        *(2, max(len(found), 1)),
        figsize=(5.5 * max(len(found), 1), 5.5),
        height_ratios=(3, 1),
        squeeze=False,
        layout="constrained",
    )
    for column, (target, records) in enumerate(found.items()):
        above, below = axes[:, column]
        shown = [one for one in records["layers"] if one["backward"] and not one["masked"]]
        cases = list(dict.fromkeys((one["dtype"], one["layout"]) for one in shown))
        names = list(dict.fromkeys(one["layer"] for one in shown))
        for k, name in enumerate(names):
            passes = [one["passes"] for one in shown if one["layer"] == name]
            places = np.arange(len(cases)) + (k - (len(names) - 1) / 2) * 0.25
            above.bar(places, passes, 0.25, color=f"C{k}", label=name)
        above.axhline(8, color="gray", lw=0.8, ls=":", label="floor")
        above.set_xticks(range(len(cases)), ["\n".join(case) for case in cases], fontsize=8)
        above.set_ylabel("bytes of a layer over its input's\n(forward + backward)", fontsize=9)
        above.set_title(TARGETS[target].title)
        networks = records["network"]
        colors = [f"C{names.index(one['layer'])}" for one in networks]
        gigabytes = [one["bytes"] / 1e9 for one in networks]
        bars = below.barh([one["layer"] for one in networks], gigabytes, color=colors)
        below.bar_label(bars, fmt="%.1f", label_type="center", color="white")
        below.invert_yaxis()
        below.set_xlabel("bytes of a ResNet's training step on one device, GB", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    _save(figure, path)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "speed": speed,
    "memory": memory,
    "accuracy": accuracy,
    "compiled": compiled,
}


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
