"""The plot of a history."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train_examples.common.plots import COLORS
from train_examples.torch_twin.lockstep import DTYPES, TRUTH, History, Name
from train_examples.torch_twin.report import TITLES, Curves, curves


def picture(history: History) -> Figure:
    """Plot the distances by step, within each dtype and of float32 from float64."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (kind, title) in zip(axes, TITLES.items(), strict=False):
        for dtype in DTYPES:
            found = curves(history, kind, dtype)
            _draw(ax, found)
            # Labels are above float64's lines and far below float32's, some of which rise late.
            offset = 14 if dtype == "float64" else -45
            end = (len(found.ours), found.ours[-1])
            ax.annotate(dtype, end, (0, offset), textcoords="offset points", ha="right")
        ax.set_title(f"{title.capitalize()},\nfrom PyTorch in the same precision", size=9)
    axes[0].set_ylabel("relative L2 distance")
    truth = [d.parameters for d in history.distances[Name("PyTorch", "float32"), TRUTH]]
    _draw(axes[2], curves(history, "parameters", "float32", TRUTH))
    axes[2].plot(range(1, len(truth) + 1), truth, "--", color=COLORS[2], label="PyTorch")
    axes[2].set_title("Parameters in float32,\nfrom PyTorch in float64", size=9)
    for ax in axes:
        ax.set(xlabel="step", xscale="log", yscale="log")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    handles, labels = axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _draw(ax: Axes, found: Curves) -> None:
    steps = range(1, len(found.ours) + 1)
    ax.plot(steps, found.ours, color=COLORS[0], label="jaxbn", zorder=3)
    for number, values in enumerate(found.reordered):
        label = None if number else "PyTorch, examples of each batch reordered"
        ax.plot(steps, values, color=COLORS[1], linewidth=0.8, alpha=0.7, label=label)
