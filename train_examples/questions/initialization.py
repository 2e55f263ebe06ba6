"""5. How does it change the sensitivity to weight initialization?

It removes most of it. At the first step the output does not depend on the scale of the kernels
before the layer, and the size of gradients does not multiply from layer to layer. Two effects
remain. Gradients are proportional to 1 / scale, so the effective learning rate of a kernel is
rate / scale^2. And the invariance ends where the features' variance falls to epsilon.

Predictions: with batch norm a wider range of scales learns, each scale with the best of several
learning rates; the first output does not depend on the scale; gradients are proportional to
1 / scale; at each learning rate, all scales learn.
"""

from itertools import product
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from train_examples.common.model import ConvNet
from train_examples.common.training import loss_fn
from train_examples.digits.train import TrainState
from train_examples.questions import common, drawing
from train_examples.questions.common import Settings, Verdict

SCALES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
RATES = (0.01, 0.1, 1.0)


class Result(NamedTuple):
    """What was measured. The networks are those of `common.NETWORKS`.

    Attributes:
      scales: the factors by which the initial kernels of He et al. are multiplied.
      rates: the learning rates.
      accuracy: the accuracy on the test set, (networks, scales, rates, seeds).
      moved: the largest change of the first batch's logits from those of scale 1, over the largest
        of these, (networks, scales, seeds).
      gradient: the length of the kernels' gradient at the first step, over that of scale 1,
        (networks, scales, seeds).
    """

    scales: np.ndarray
    rates: np.ndarray
    accuracy: np.ndarray
    moved: np.ndarray
    gradient: np.ndarray


def run(settings: Settings) -> Result:
    """Train from every scale at every rate, with batch norm and without."""
    scales = np.array(settings.pick(SCALES, (0.1, 1.0)))
    rates = np.array(settings.pick(RATES, (0.1,)))
    models = (ConvNet(widths=settings.widths), common.plain(settings.widths))
    shape = (len(models), len(scales), len(rates), settings.seeds)
    accuracy = np.empty(shape)
    for index in track(list(product(*map(range, shape))), "5: networks by initial scale"):
        which, row, column, seed = index
        state = common.start(models[which], seed, rates[column], scales[row])
        accuracy[index] = common.test_score(common.train(state, settings.epochs(10), seed)).accuracy

    moved, gradient = np.empty((2, len(models), len(scales), settings.seeds))
    for which, seed in product(range(len(models)), range(settings.seeds)):
        reference, length = _first_step(common.start(models[which], seed, 0.0), seed)
        for row, scale in enumerate(scales):
            logits, own = _first_step(common.start(models[which], seed, 0.0, scale), seed)
            moved[which, row, seed] = np.abs(logits - reference).max() / np.abs(reference).max()
            gradient[which, row, seed] = own / length
    return Result(scales, rates, accuracy, moved, gradient)


def _first_step(state: TrainState, seed: int) -> tuple[np.ndarray, float]:
    """Return the logits of the first batch, and the length of the kernels' gradient."""
    batch = next(common.batches(1, seed))
    images, labels = common.digits().train_images[batch], common.digits().train_labels[batch]
    gradients, (logits, _) = _GRADIENT(
        state.params, state.batch_stats, state.apply_fn, images, labels
    )
    return np.asarray(logits), common.kernel_length(gradients)


_GRADIENT = jax.jit(jax.grad(loss_fn, has_aux=True), static_argnums=2)


def best(result: Result) -> np.ndarray:
    """Return the accuracy at the rate with the best mean, (networks, scales, seeds)."""
    at = result.accuracy.mean(-1).argmax(-1)[..., None, None]
    return np.take_along_axis(result.accuracy, at, 2)[:, :, 0]


def learns(result: Result) -> np.ndarray:
    """Return whether every seed reaches `common.LEARNED` at the best rate, (networks, scales)."""
    return best(result).min(-1) >= common.LEARNED


def width(result: Result) -> np.ndarray:
    """Return the largest scale that learns over the smallest, (networks,)."""
    return np.array(
        [result.scales[row].max() / result.scales[row].min() if row.any() else 0
         for row in learns(result)]
    )  # fmt: skip


def verdicts(result: Result) -> list[Verdict]:
    """Compare the predictions with what was measured."""
    wide = width(result)
    # Here a feature's variance, some 0.1 times the square of the scale, is far above epsilon.
    usual = (result.scales >= 0.3) & (result.scales <= 100)
    moved = result.moved[0][usual].max()
    logs = np.log(result.gradient[0][usual].mean(-1))
    exponent = np.polyfit(np.log(result.scales[usual]), logs, 1)[0] if usual.sum() > 1 else -1.0
    fixed = np.sum(result.accuracy[0].min(-1) >= common.LEARNED, 0)
    return [
        Verdict(
            f"a wider range of scales reaches {common.LEARNED:.0%} with batch norm than without",
            f"a factor of {wide[0]:.0f} and {wide[1]:.0f}",
            bool(wide[0] > wide[1]),
        ),
        Verdict(
            "from scale 0.3 up, the first batch's output changes by at most 1 %",
            f"by at most {moved:.1e}; without batch norm by up to "
            f"{result.moved[1][usual].max():.1e}",
            bool(moved <= 0.01),
        ),
        Verdict(
            "from scale 0.3 up, gradients are proportional to 1 / scale",
            f"to scale to the {exponent:.2f}",
            bool(abs(exponent + 1) <= 0.1),
        ),
        Verdict(
            "with batch norm, every scale learns at every learning rate",
            ", ".join(
                f"{count} of {len(result.scales)} at {rate:g}"
                for rate, count in zip(result.rates, fixed, strict=True)
            ),
            bool((fixed == len(result.scales)).all()),
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Return the tables of accuracy at the best rate and of the first step."""
    accuracy = best(result)
    at = result.rates[result.accuracy.mean(-1).argmax(-1)]
    trained = drawing.table(
        "Test accuracy at the best rate, mean (smallest to largest of the seeds), and that rate",
        ("scale", *(column for name in common.NETWORKS for column in (name, "rate"))),
        [
            (
                f"{scale:g}",
                *(
                    cell
                    for which in range(2)
                    for cell in (common.spread(accuracy[which, row], ".1%"), f"{at[which, row]:g}")
                ),
            )
            for row, scale in enumerate(result.scales)
        ],
    )
    columns = ("output moves", "without", "gradient", "without")
    first = drawing.table(
        "The first step, relative to scale 1, mean of the seeds, with batch norm and without",
        ("scale", *columns),
        [
            (
                f"{scale:g}",
                *(f"{values[row].mean():.1e}" for values in (*result.moved, *result.gradient)),
            )
            for row, scale in enumerate(result.scales)
        ],
    )
    return [trained, first]


def plot(result: Result) -> Figure:
    """Plot the accuracy at the best rate and, with batch norm, at each rate."""
    figure, (left, right) = drawing.panels(2)
    scales = result.scales.tolist()
    for number, name in enumerate(common.NETWORKS):
        drawing.band(left, scales, 100 * best(result)[number], number, name)
    for number, rate in enumerate(result.rates):
        values = 100 * result.accuracy[0, :, number]
        drawing.band(right, scales, values, number, f"learning rate {rate:g}")
    left.set(title="Each with its best learning rate")
    right.set(title="With batch norm, by learning rate")
    for ax in (left, right):
        ax.set(xlabel="scale of initial kernels", ylabel="test accuracy (%)", xscale="log")
        ax.set_ylim(0, 103)
        drawing.legend_below(ax)
    return figure
