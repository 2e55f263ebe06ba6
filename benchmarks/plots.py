"""Draw a picture of each section that has more than a handful of numbers."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from benchmarks.targets import TARGETS
from jaxbn._palette import COLORS, DPI

# In inches: as wide as a page of GitHub shows a picture, at 100 dots an inch.
WIDTH = 7.4
_EXACT, _NOT_A_NUMBER = 1e-9, 1e7


def speed(data: dict[str, Any], path: Path) -> None:
    """Plot our time over each contender's in training, a dot for each shape, a bar for their mean.

    The mean is geometric. Only the first kind of data is plotted, and no evaluation, in which all
    layers take about as long.
    """
    first = next(iter(data["data"]))
    cases, summary = (
        [one for one in data[part] if one["data"] == first] for part in ("cases", "summary")
    )
    kinds = {"forward": "forward", "forward_backward": "forward + backward"}
    dtypes = list(dict.fromkeys(one["dtype"] for one in summary))
    layouts = dict(zip(dict.fromkeys(one["layout"] for one in summary), COLORS, strict=False))
    names = [n for n in dict.fromkeys(one["contender"] for one in summary) if n != "ours"]
    figure, axes = plt.subplots(
        *(len(kinds), len(dtypes)),
        figsize=(WIDTH, 5),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for at, (kind, dtype) in zip(axes.flat, itertools.product(kinds, dtypes), strict=True):
        for x, name in enumerate(names):
            for column, (layout, color) in enumerate(layouts.items()):
                fields = {"dtype": dtype, "layout": layout, "pass": kind, "contender": name}
                dots, means = (
                    [o["ours_over_it"] for o in part if fields.items() <= o.items()]
                    for part in (cases, summary)
                )
                place = x + 0.4 * (column - (len(layouts) - 1) / 2)
                at.plot([place] * len(dots), dots, "o", ms=3, alpha=0.5, color=color)
                for mean in means:
                    at.plot([place - 0.17, place + 0.17], [mean, mean], color=color, lw=2.5)
        at.axhline(1, color="gray", lw=0.8, ls=":")
        at.set_title(f"{kinds[kind]}, {dtype}", fontsize=10)
        at.set_yscale("log")
        at.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        at.minorticks_off()
        at.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], fontsize=9)
    handles = [Line2D([], [], color=color, lw=2.5) for color in layouts.values()]
    figure.legend(handles, layouts, loc="outside lower center", ncols=len(layouts), frameon=False)
    figure.supylabel(f"our time / theirs, data: {first}", fontsize=10)
    _save(figure, path)


def accuracy(data: dict[str, Any], path: Path) -> None:
    inputs = list(data["errors"])
    names = list(data["errors"][inputs[0]])
    fields = list(data["errors"][inputs[0]][names[0]])
    figure, axes = plt.subplots(
        1, len(fields), figsize=(WIDTH, 4.6), sharey=True, layout="constrained"
    )
    for at, field in zip(axes, fields, strict=True):
        for k, name in enumerate(names):
            errors = [data["errors"][i][name][field] for i in inputs]
            # Exact results and NaN are drawn at the ends of the logarithmic axis.
            places = [_NOT_A_NUMBER if e is None else max(e, _EXACT) for e in errors]
            shift = (k - (len(names) - 1) / 2) * 0.1
            at.plot(places, np.arange(len(inputs)) + shift, "o", ms=4, color=COLORS[k], label=name)
        at.axvline(2.0**-24, color="gray", lw=0.8, ls=":")
        at.set(xscale="log", title=field, xlabel="largest error")
        ticks = {_EXACT: "exact", 1e-6: "1e-6", 1e-3: "1e-3", 1: "1", _NOT_A_NUMBER: "nan"}
        at.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
        at.minorticks_off()
        at.set_yticks(range(len(inputs)), inputs)
    axes[0].invert_yaxis()
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        fontsize=9,
    )
    _save(figure, path)


def memory(data: dict[str, Any], path: Path) -> None:
    """Plot what a layer keeps for its backward pass, and the temporaries of a training step."""
    cases = data["cases"]
    dtypes = list(dict.fromkeys(one["dtype"] for one in cases))
    layers = dict(zip(dict.fromkeys(one["layer"] for one in cases), COLORS, strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3), layout="constrained")
    titles = {
        "kept_per_input_byte": "kept for the backward pass,\nbytes per byte of the input",
        "step_temporary_bytes": "temporaries of a training step of a\nsmall residual network, MB",
    }
    for at, (field, title) in zip(axes, titles.items(), strict=True):
        for k, (layer, color) in enumerate(layers.items()):
            values = [one[field] or 0 for one in cases if one["layer"] == layer]
            heights = np.array(values) / (1e6 if field == "step_temporary_bytes" else 1)
            places = np.arange(len(dtypes)) + 0.4 * (k - (len(layers) - 1) / 2)
            bars = at.bar(places, heights, 0.38, color=color, label=layer)
            at.bar_label(bars, fmt="{:.3g}", fontsize=9)
        at.set_xticks(range(len(dtypes)), dtypes)
        at.set_title(title, fontsize=10)
        at.margins(y=0.12)
        at.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="upper left")
    _save(figure, path)


def compiled(data: dict[str, Any], path: Path) -> None:
    """Plot the bytes that a layer and a ResNet's step read and write, by machine."""
    found = data["targets"]
    figure, axes = plt.subplots(
        *(2, max(len(found), 1)),
        figsize=(WIDTH, 5),
        height_ratios=(3, 1),
        sharey="row",
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
            above.bar(places, passes, 0.25, color=COLORS[k], label=name)
        above.axhline(8, color="gray", lw=0.8, ls=":", label="floor")
        above.set_xticks(range(len(cases)), ["\n".join(case) for case in cases], fontsize=9)
        if column == 0:
            label = "bytes of a layer over its input's,\nforward + backward"
            above.set_ylabel(label, fontsize=9)
        above.set_title(TARGETS[target].title)
        networks = records["network"]
        colors = [COLORS[names.index(one["layer"])] for one in networks]
        gigabytes = [one["bytes"] / 1e9 for one in networks]
        bars = below.barh([one["layer"] for one in networks], gigabytes, color=colors)
        below.bar_label(bars, fmt="%.1f", label_type="center", color="white")
        below.set_ylim(len(networks) - 0.5, -0.5)
        below.set_xlabel("bytes of a training step of a ResNet, GB", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    _save(figure, path)


PLOTS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "speed": speed,
    "memory": memory,
    "accuracy": accuracy,
    "compiled": compiled,
}


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
