"""5. How does it change the sensitivity to weight initialization?

It takes most of it away. At the first step the output is the same whatever the scale of the
kernels before it, and gradients come back with a size that does not multiply from layer to layer.
What is left: gradients are proportional to 1 / scale, so the scale sets the learning rate that
the kernel feels, rate / scale^2; and where the features' variance falls to epsilon the invariance
ends.

What would have contradicted it: a range of scales that learn no wider than without batch norm,
each scale with the best of several learning rates; an output that depends on the scale.
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
NETWORKS = ("with batch norm", "without")


class Result(NamedTuple):
    """The first axis is (with, without), the last the seeds'.

    Attributes:
      scales: of the convolutions' kernels, over those of He et al.
      rates: of learning.
      accuracy: on the test set, (networks, scales, rates, seeds).
      moved: the largest change of a first batch's logits from those of scale 1, over the largest,
        (networks, scales, seeds).
      gradient: the length of the kernels' gradient at the first step, over that of scale 1,
        (networks, scales, seeds).
    """

    scales: np.ndarray
    rates: np.ndarray
    accuracy: np.ndarray
    moved: np.ndarray
    gradient: np.ndarray


def run(settings: Settings) -> Result:
    """Trains from every scale at every rate, with batch norm and without."""
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
    """Logits of the first batch, and the length of the kernels' gradient."""
    batch = next(common.batches(1, seed))
    images, labels = common.digits().train_images[batch], common.digits().train_labels[batch]
    gradients, (logits, _) = _GRADIENT(
        state.params, state.batch_stats, state.apply_fn, images, labels
    )
    kernels = [layer["kernel"] for name, layer in gradients.items() if name.startswith("Conv")]
    squares = sum(np.sum(np.square(kernel, dtype=float)) for kernel in kernels)
    return np.asarray(logits), float(np.sqrt(squares))


_GRADIENT = jax.jit(jax.grad(loss_fn, has_aux=True), static_argnums=2)


def best(result: Result) -> np.ndarray:
    """The accuracy at the rate that is best in the seeds' mean, (networks, scales, seeds)."""
    at = result.accuracy.mean(-1).argmax(-1)[..., None, None]
    return np.take_along_axis(result.accuracy, at, 2)[:, :, 0]


def learns(result: Result) -> np.ndarray:
    """Whether every seed reaches `common.LEARNED` at the best rate, (networks, scales)."""
    return best(result).min(-1) >= common.LEARNED


def width(result: Result) -> np.ndarray:
    """The largest scale that learns over the least: with and without."""
    return np.array(
        [result.scales[row].max() / result.scales[row].min() if row.any() else 0
         for row in learns(result)]
    )  # fmt: skip


def verdicts(result: Result) -> list[Verdict]:
    """What would have contradicted the answer."""
    wide = width(result)
    # Where the variance of a feature, some 0.1 times the scale's square, is far above epsilon.
    usual = (result.scales >= 0.3) & (result.scales <= 100)
    moved = result.moved[0][usual].max()
    logs = np.log(result.gradient[0][usual].mean(-1))
    exponent = np.polyfit(np.log(result.scales[usual]), logs, 1)[0] if usual.sum() > 1 else -1.0
    fixed = np.sum(result.accuracy[0].min(-1) >= common.LEARNED, 0)
    return [
        Verdict(
            bool(wide[0] <= wide[1]),
            f"scales that reach {common.LEARNED:.0%} were not a wider range with it",
            f"a factor of {wide[0]:.0f} against {wide[1]:.0f}",
        ),
        Verdict(
            bool(moved > 0.01),
            "the first batch's output moved by over 1 % from scale 0.3 up",
            f"by {moved:.1e} at most; without, by {result.moved[1][usual].max():.1e}",
        ),
        Verdict(
            bool(abs(exponent + 1) > 0.1),
            "gradients were not proportional to 1 / scale from scale 0.3 up",
            f"to scale to the {exponent:.2f}",
        ),
        Verdict(
            bool((fixed < len(result.scales)).any()),
            "at one of the learning rates some scale did not learn with it",
            ", ".join(
                f"at {rate:g}, {count} of {len(result.scales)} do"
                for rate, count in zip(result.rates, fixed, strict=True)
            ),
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Accuracies at the best rate and at each; the first step."""
    accuracy = best(result)
    at = result.rates[result.accuracy.mean(-1).argmax(-1)]
    trained = drawing.table(
        "Test accuracy at the best rate, mean (least to largest of the seeds), and that rate",
        ("scale", *(column for name in NETWORKS for column in (name, "rate"))),
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
    """Accuracy at the best rate; with batch norm at each."""
    figure, (left, right) = drawing.panels(2)
    scales = result.scales.tolist()
    for number, name in enumerate(NETWORKS):
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
