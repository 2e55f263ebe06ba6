"""4. What does it allow for the learning rate?

A larger one. The output of a normalized layer does not depend on the length of its kernel. A step
that is too long makes the kernel longer, which makes the next gradient smaller, so training slows
down instead of diverging. Networks without batch norm diverge at rates at which networks with batch
norm learn best.

Predictions: with batch norm, training diverges only at a larger rate; the best rate is larger; the
kernels grow where the rate is high.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from train_examples.common.model import ConvNet
from train_examples.digits.train import TrainState
from train_examples.questions import common, drawing
from train_examples.questions.common import Settings, Verdict

RATES = tuple(float(f"{10 ** (k / 2):.1g}") for k in range(-5, 4))


class Result(NamedTuple):
    """What was measured. The networks are those of `common.NETWORKS`.

    Attributes:
      rates: the learning rates.
      loss: the loss on the training set after training, (networks, rates, seeds). NaN is replaced
        by infinity.
      accuracy: the accuracy on the test set, (networks, rates, seeds).
      growth: the length of the convolutions' kernels at the end over that at the start, with batch
        norm, (rates, seeds).
    """

    rates: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    growth: np.ndarray


def run(settings: Settings) -> Result:
    """Train at every rate, with batch norm and without."""
    rates = np.array(settings.pick(RATES, (0.1, 10.0)))
    models = (ConvNet(widths=settings.widths), common.plain(settings.widths))
    shape = (len(models), len(rates), settings.seeds)
    loss, accuracy, growth = np.empty(shape), np.empty(shape), np.empty(shape[1:])
    runs = list(product(*map(range, shape)))
    for index in track(runs, "4: networks by learning rate"):
        which, row, seed = index
        before = common.start(models[which], seed, rates[row])
        after = common.train(before, settings.epochs(10), seed)
        loss[index] = np.nan_to_num(common.train_score(after).loss, nan=np.inf)
        accuracy[index] = common.test_score(after).accuracy
        if which == 0:
            growth[row, seed] = _growth(before, after)
    return Result(rates, loss, accuracy, growth)


def _growth(before: TrainState, after: TrainState) -> float:
    """Return the length of the convolutions' kernels after training, over that before."""
    return common.kernel_length(after.params) / common.kernel_length(before.params)


def best(result: Result) -> np.ndarray:
    """Return the rate with the smallest mean loss of the seeds, (networks,)."""
    return result.rates[np.argmin(result.loss.mean(-1), -1)]


def learned(result: Result) -> np.ndarray:
    """Return the largest rate at which every seed learned, (networks,)."""
    every = result.accuracy.min(-1) >= common.LEARNED
    return np.array([result.rates[row].max(initial=0) for row in every])


def failed(result: Result) -> np.ndarray:
    """Return the smallest rate at which some seed's loss ended above a guess's, (networks,)."""
    some = result.loss.max(-1) >= common.CHANCE
    return np.array([result.rates[row].min(initial=np.inf) for row in some])


def verdicts(result: Result) -> list[Verdict]:
    """Compare the predictions with what was measured."""
    largest, smallest, at = learned(result), failed(result), best(result)
    column = int(np.flatnonzero(result.rates == largest[0])[0]) if largest[0] else 0
    growth = result.growth[column].mean()
    return [
        Verdict(
            f"the largest rate at which every seed reaches {common.LEARNED:.0%} is larger with "
            "batch norm than without",
            f"{largest[0]:g} and {largest[1]:g}",
            bool(largest[0] > largest[1]),
        ),
        Verdict(
            "the smallest rate at which some seed's loss ends above a guess's is larger with batch "
            "norm than without",
            f"{smallest[0]:g} and {smallest[1]:g}",
            bool(smallest[0] > smallest[1]),
        ),
        Verdict(
            "the rate with the smallest training loss is larger with batch norm than without",
            f"{at[0]:g} and {at[1]:g}",
            bool(at[0] > at[1]),
        ),
        Verdict(
            f"with batch norm, kernels grow to at least 1.5 times their length at a rate of "
            f"{result.rates[column]:g}",
            f"{growth:.3g} times",
            bool(growth >= 1.5),
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Return the table of accuracy, loss and growth of the kernels by rate."""
    rows = zip(
        *(result.rates, result.accuracy[0], result.accuracy[1], result.loss[0], result.loss[1]),
        result.growth,
        strict=True,
    )
    return [
        drawing.table(
            "Mean (smallest to largest of the seeds), with batch norm | without",
            ("rate", "test accuracy", "without", "training loss", "without", "kernels grow"),
            [
                (
                    f"{rate:g}",
                    *(common.spread(a, ".1%") for a in accuracies),
                    *(common.spread(a, ".2g") for a in losses),
                    f"{growth.mean():.3g}",
                )
                for rate, *accuracies, loss, other, growth in rows
                for losses in [(loss, other)]
            ],
        )
    ]


def plot(result: Result) -> Figure:
    """Plot accuracy and loss against the rate."""
    figure, (left, right) = drawing.panels(2)
    rates = result.rates.tolist()
    # Infinite losses are drawn above the top of the axes.
    loss = np.clip(result.loss, None, 1e3)
    for number, name in enumerate(common.NETWORKS):
        drawing.band(left, rates, 100 * result.accuracy[number], number, name)
        drawing.band(right, rates, loss[number], number, name)
    right.axhline(common.CHANCE, color="gray", linestyle=":", label="a guess")
    left.set(title="Test accuracy (%)", xlabel="learning rate", xscale="log")
    right.set(title="Training loss at the end", xlabel="learning rate", xscale="log", yscale="log")
    right.set_ylim(top=30)
    for ax in (left, right):
        drawing.legend_below(ax)
    return figure
