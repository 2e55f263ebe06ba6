"""4. What does it allow for the learning rate?

A larger one. The output of a normalized layer does not depend on the length of its kernel, so a
step that is too long makes the kernel longer, which makes the next gradient shorter: a step too
far does not blow up, but slows down. Networks without it diverge at rates at which networks with
it learn best.

What would have contradicted it: both diverging at the same rate; the best rate being the same;
the kernels not growing where the rate is high.
"""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from train_examples.common.model import ConvNet
from train_examples.digits.train import TrainState
from train_examples.questions import common, drawing
from train_examples.questions.common import Settings, Verdict

RATES = tuple(float(f"{10 ** (k / 2):.1g}") for k in range(-5, 4))
NETWORKS = ("with batch norm", "without")


class Result(NamedTuple):
    """The axes are (with, without), rates, seeds, where not said otherwise.

    Attributes:
      rates: of learning.
      loss: on the training set, after training; infinite where it was not a number.
      accuracy: on the test set.
      growth: the length of the convolutions' kernels over what it was at first, with batch norm,
        (rates, seeds).
    """

    rates: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    growth: np.ndarray


def run(settings: Settings) -> Result:
    """Trains at every rate, with batch norm and without."""
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
            growth[row, seed] = length(after) / length(before)
    return Result(rates, loss, accuracy, growth)


def length(state: TrainState) -> float:
    """Of the convolutions' kernels together."""
    params: Any = state.params
    kernels = [layer["kernel"] for name, layer in params.items() if name.startswith("Conv")]
    return float(np.sqrt(sum(np.sum(np.square(kernel, dtype=float)) for kernel in kernels)))


def best(result: Result) -> np.ndarray:
    """The rate of the least loss, in the seeds' mean: with and without."""
    return result.rates[np.argmin(result.loss.mean(-1), -1)]


def learned(result: Result) -> np.ndarray:
    """The largest rate at which every seed learned: with and without."""
    every = result.accuracy.min(-1) >= common.LEARNED
    return np.array([result.rates[row].max(initial=0) for row in every])


def failed(result: Result) -> np.ndarray:
    """The least rate at which some seed's loss ended above that of a guess: with and without."""
    some = result.loss.max(-1) >= common.CHANCE
    return np.array([result.rates[row].min(initial=np.inf) for row in some])


def verdicts(result: Result) -> list[Verdict]:
    """What would have contradicted the answer."""
    largest, least, at = learned(result), failed(result), best(result)
    column = int(np.flatnonzero(result.rates == largest[0])[0]) if largest[0] else 0
    growth = result.growth[column].mean()
    return [
        Verdict(
            bool(largest[0] <= largest[1]),
            f"the largest rate that takes every seed to {common.LEARNED:.0%} were not larger",
            f"{largest[0]:g} against {largest[1]:g}",
        ),
        Verdict(
            bool(least[0] <= least[1]),
            "the least rate that ends above a guess's loss in some seed were not larger",
            f"{least[0]:g} against {least[1]:g}",
        ),
        Verdict(
            bool(at[0] <= at[1]),
            "the rate of the least training loss were not larger",
            f"{at[0]:g} against {at[1]:g}",
        ),
        Verdict(
            bool(growth < 1.5),
            f"kernels had not grown at a rate of {result.rates[column]:g} with it",
            f"{growth:.3g} times as long as at first",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Loss, accuracy and length of the kernels."""
    rows = zip(
        *(result.rates, result.accuracy[0], result.accuracy[1], result.loss[0], result.loss[1]),
        result.growth,
        strict=True,
    )
    return [
        drawing.table(
            "Mean (least to largest of the seeds), with batch norm | without",
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
    """Accuracy, loss."""
    figure, (left, right) = drawing.panels(2)
    rates = result.rates.tolist()
    # What is infinite leaves through the top.
    loss = np.clip(result.loss, None, 1e3)
    for number, name in enumerate(NETWORKS):
        drawing.band(left, rates, 100 * result.accuracy[number], number, name)
        drawing.band(right, rates, loss[number], number, name)
    right.axhline(common.CHANCE, color="gray", linestyle=":", label="a guess")
    left.set(title="Test accuracy (%)", xlabel="learning rate", xscale="log")
    right.set(title="Training loss at the end", xlabel="learning rate", xscale="log", yscale="log")
    right.set_ylim(top=30)
    for ax in (left, right):
        drawing.legend_below(ax)
    return figure
