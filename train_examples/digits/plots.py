"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train_examples.common.history import CHANNELS, History, first_channels
from train_examples.common.plots import COLORS, DPI, tidy
from train_examples.digits.run import Result


def write_pictures(result: Result, out: Path) -> list[Path]:
    """Write loss.png, accuracy.png and moving_averages.png into a folder; return their paths."""
    figures = {
        "loss.png": loss(result.history),
        "accuracy.png": accuracy(result.history),
        "moving_averages.png": moving_averages(result),
    }
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=DPI)
    return [out / name for name in figures]


def loss(history: History) -> Figure:
    """Draw the loss of every step, and its mean over every epoch."""
    figure, ax = _figure_and_axes()
    steps_per_epoch = len(history.loss) // len(history.test_accuracy)
    epochs = np.arange(1, len(history.loss) + 1) / steps_per_epoch
    means = np.reshape(history.loss, (-1, steps_per_epoch)).mean(1)
    ax.plot(epochs, history.loss, color=COLORS[0], alpha=0.35, linewidth=0.8, label="each batch")
    # The mean of an epoch is drawn at its middle.
    middles = np.arange(len(means)) + 0.5
    ax.plot(middles, means, ".-", color=COLORS[0], label="mean of an epoch")
    ax.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    ax.legend(frameon=False)
    return figure


def accuracy(history: History) -> Figure:
    """Draw the accuracy on the training batches, and on the test set after each epoch."""
    figure, ax = _figure_and_axes()
    train = np.reshape(history.train_accuracy, (len(history.test_accuracy), -1)).mean(1)
    epochs = np.arange(1, len(train) + 1)
    curves = (
        (train, "training (augmented batches, own statistics)"),
        (history.test_accuracy, "test (moving averages)"),
    )
    for (values, label), color in zip(curves, COLORS, strict=False):
        ax.plot(epochs, 100 * np.asarray(values), ".-", color=color, label=label)
    ax.set(title="Accuracy", xlabel="epoch", ylabel="images classified correctly (%)")
    ax.legend(frameon=False, loc="lower right")
    return figure


def moving_averages(result: Result) -> Figure:
    """Draw how moving means and variances approach the statistics of the training set."""
    history = result.history
    final = first_channels(result.training_statistics)
    layers = sorted({name.rsplit("/", 1)[0] for name in history.moving})
    figure = Figure(figsize=(3.2 * len(layers), 5.6), layout="constrained")
    axes = figure.subplots(2, len(layers), sharex=True, squeeze=False)
    for row, statistic in enumerate(("mean", "var")):
        for column, layer in enumerate(layers):
            ax = axes[row, column]
            name = f"{layer}/{statistic}"
            _draw_moving(ax, history.moving_steps, history.moving[name], final[name])
            if row == 0:
                ax.set_title(layer)
            else:
                ax.set_xlabel("step")
            if column == 0:
                ax.set_ylabel({"mean": "moving mean", "var": "moving variance"}[statistic])
    figure.suptitle(
        f"Moving averages of the first {CHANNELS} channels, a colour each (solid), and the "
        f"statistics of the training set at the end (dashed)"
    )
    return figure


def _draw_moving(
    ax: Axes, steps: Sequence[int], values: Sequence[Sequence[float]], final: Sequence[float]
) -> None:
    for channel, color in zip(range(len(final)), COLORS, strict=False):
        ax.plot(steps, [value[channel] for value in values], color=color, linewidth=1.2)
        ax.axhline(final[channel], color=color, linestyle="--", linewidth=0.9, alpha=0.7)
    tidy(ax)


def _figure_and_axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    ax = figure.subplots()
    tidy(ax)
    return figure, ax
