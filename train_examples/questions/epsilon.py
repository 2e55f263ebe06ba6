"""1. Why is there an epsilon in the denominator?

Because a feature can be constant in a batch. Its variance is zero, and without epsilon its output
is 0 / 0. With it the output is the bias, and the derivative of the output is at most scale /
sqrt(epsilon). Epsilon is also the variance below which the layer stops normalizing: a feature of
variance v comes out with the deviation sqrt(v / (v + epsilon)), so that what is next to constant,
and mostly noise, is not blown up.

What would have contradicted it: gradients that stay bounded as epsilon goes to 0; networks that
learn as well with next to no epsilon; networks that learn as well with any epsilon, however
large.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

import jaxbn
from train_examples.common.model import ConvNet, pytorch_norm
from train_examples.questions import common, drawing
from train_examples.questions.common import Settings, Verdict

GRADIENTS_AT = tuple(10.0**-k for k in (0, 2, 4, 6, 8, 12, 16, 20, 24, 30))
DEVIATIONS_AT = (1e-5, 1e-3, 1e-1)
TRAIN_AT = (1e-30, 1e-12, 1e-8, 1e-5, 1e-3, 1e-1, 1e1, 1e3)
USUAL = 1e-5
LEARNING_RATE = 0.1


class PixelNormed(nn.Module):
    """The network behind a batch norm of the image, whose features are the 64 pixels.

    Some of them are constant in most batches, and four in all training images. Epsilon is read from
    the state, so that all values of it share one compiled step. A momentum of 0.8 forgets the
    initial variance of one in these short trainings, as the usual 0.9 does in twice the time.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        epsilon = self.variable("batch_stats", "epsilon", lambda: jnp.float32(USUAL)).value
        norm = partial(pytorch_norm, epsilon=epsilon, momentum=0.8)
        x = norm(use_running_average=not train, axis=(1, 2, 3))(images)
        return ConvNet(widths=self.widths, norm=norm)(x, train, mask)


class Result(NamedTuple):
    """Rows for values of epsilon, columns for seeds, where not said otherwise.

    Attributes:
      constant: the number of pixels that are constant in each seed's batch.
      nan_without: the number of those that are NaN where epsilon is 0.
      off_bias: the largest distance of a constant pixel's output from the bias.
      constant_gradient: the largest gradient with respect to constant pixels.
      varying_gradient: the same, of pixels whose variance is above a hundredth.
      variance: of each pixel in all training images, in ascending order.
      deviation: of each normalized pixel, a row for each of `DEVIATIONS_AT`.
      train_at: the values of epsilon that networks were trained with.
      test_loss, accuracy: on the test set.
    """

    constant: np.ndarray
    nan_without: np.ndarray
    off_bias: float
    constant_gradient: np.ndarray
    varying_gradient: np.ndarray
    variance: np.ndarray
    deviation: np.ndarray
    train_at: np.ndarray
    test_loss: np.ndarray
    accuracy: np.ndarray


def run(settings: Settings) -> Result:
    """Normalizes pixels with many values of epsilon, and trains with some."""
    seeds = range(settings.seeds)
    pixels = common.digits().train_images.reshape(-1, 64)
    batches = [pixels[next(common.batches(1, seed))] for seed in seeds]
    found = [_normalize(batch, seed) for seed, batch in enumerate(batches)]
    constant, without, off_bias, of_constant, of_varying = (
        np.array(column) for column in zip(*found, strict=True)
    )
    variance = pixels.var(0)
    order = np.argsort(variance)
    params, state = jaxbn.init(pixels.shape)
    deviation = [
        np.std(jaxbn.batch_norm(params, state, pixels, True, epsilon=epsilon)[0], axis=0)[order]
        for epsilon in DEVIATIONS_AT
    ]

    train_at = np.array(settings.pick(TRAIN_AT, (USUAL,)))
    scores = np.empty((len(train_at), settings.seeds, 2))
    model = PixelNormed(settings.widths)
    for row, epsilon in enumerate(track(train_at, "1: networks by epsilon")):
        for seed in seeds:
            state = common.start(model, seed, LEARNING_RATE)
            statistics = {**state.batch_stats, "epsilon": jnp.float32(epsilon)}
            state = state.replace(batch_stats=statistics)
            scores[row, seed] = common.test_score(common.train(state, settings.epochs(5), seed))
    return Result(
        constant,
        without,
        float(off_bias.max()),
        of_constant.T,
        of_varying.T,
        variance[order],
        np.array(deviation),
        train_at,
        scores[..., 0],
        scores[..., 1],
    )


def _normalize(batch: np.ndarray, seed: int) -> tuple[int, int, float, list[float], list[float]]:
    """What becomes of the constant pixels of one batch."""
    constant = batch.var(0) == 0
    varying = batch.var(0) > 1e-2
    # What the formula says without epsilon.
    with np.errstate(invalid="ignore"):
        without = (batch - batch.mean(0)) / np.sqrt(batch.var(0))

    params, state = jaxbn.init(batch.shape)
    params["bias"] = jax.random.normal(jax.random.key(seed), (batch.shape[1],))
    cotangent = jax.random.normal(jax.random.key(seed + 1), batch.shape)
    off_bias, of_constant, of_varying = 0.0, [], []
    for epsilon in GRADIENTS_AT:

        def normalized(x: jax.Array, epsilon: float = epsilon) -> jax.Array:
            return jaxbn.batch_norm(params, state, x, True, epsilon=epsilon)[0]

        y, vjp = jax.vjp(normalized, jnp.asarray(batch))
        (gradient,) = vjp(cotangent)
        distances = np.abs(np.asarray(y - params["bias"]))[:, constant]
        off_bias = max(off_bias, float(distances.max()))
        of_constant.append(float(np.abs(gradient[:, constant]).max()))
        of_varying.append(float(np.abs(gradient[:, varying]).max()))
    nan_without = int(np.isnan(without).any(0).sum())
    return int(constant.sum()), nan_without, off_bias, of_constant, of_varying


def exponent(result: Result) -> float:
    """The p of "gradient proportional to epsilon to the p" of constant pixels."""
    logs = np.log(result.constant_gradient.mean(1))
    return float(np.polyfit(np.log(GRADIENTS_AT), logs, 1)[0])


def verdicts(result: Result) -> list[Verdict]:
    """What would have contradicted the answer."""
    p = exponent(result)
    usual = result.accuracy[result.train_at == USUAL].mean()
    least, most = result.accuracy[0].mean(), result.accuracy[-1].mean()
    loss, usual_loss = result.test_loss[0].mean(), result.test_loss[result.train_at == USUAL].mean()
    return [
        Verdict(
            bool(result.constant.min() == 0 or (result.nan_without != result.constant).any()),
            "no feature were constant, or 0 / 0 harmless",
            f"{common.spread(result.constant, '.0f')} of 64 pixels are constant in a batch, and "
            f"{common.spread(result.nan_without, '.0f')} NaN without epsilon",
        ),
        Verdict(
            p > -0.25,
            "gradients of constant features stayed bounded as epsilon goes to 0",
            f"they grow like epsilon to the {p:.3f}",
        ),
        Verdict(
            bool(loss <= 1.1 * usual_loss),
            f"epsilon {result.train_at[0]:.0e} had a test loss within 10 % of that of {USUAL:.0e}",
            f"{loss:.2g} against {usual_loss:.2g}",
        ),
        Verdict(
            bool(least >= usual - 0.01),
            f"epsilon {result.train_at[0]:.0e} were within 1 % of the accuracy at {USUAL:.0e}",
            f"{least:.1%} against {usual:.1%}",
        ),
        Verdict(
            bool(most >= usual - 0.01),
            f"epsilon {result.train_at[-1]:.0e} were within 1 % of the accuracy at {USUAL:.0e}",
            f"{most:.1%} against {usual:.1%}",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Gradients, deviations, accuracies."""
    rows = zip(GRADIENTS_AT, result.constant_gradient, result.varying_gradient, strict=True)
    gradients = drawing.table(
        "Largest gradient with respect to pixels: mean (least to largest of the seeds)",
        ("epsilon", "of constant pixels", "of others"),
        [(f"{e:.0e}", common.spread(a, ".2g"), common.spread(b, ".3g")) for e, a, b in rows],
    )
    shown = np.flatnonzero(result.variance > 0)[[0, 2, 4, 6, 20, -1]]
    deviations = drawing.table(
        "Deviation of normalized pixels",
        ("variance of the pixel", *(f"epsilon {e:.0e}" for e in DEVIATIONS_AT)),
        [
            (f"{result.variance[i]:.1e}", *(f"{d:.3f}" for d in result.deviation[:, i]))
            for i in shown
        ],
    )
    rows = zip(result.train_at, result.accuracy, result.test_loss, strict=True)
    trained = drawing.table(
        "Networks trained with epsilon",
        ("epsilon", "test accuracy", "test loss"),
        [(f"{e:.0e}", common.spread(a, ".1%"), common.spread(b, ".2g")) for e, a, b in rows],
    )
    return [gradients, deviations, trained]


def plot(result: Result) -> Figure:
    """Gradients, deviations, accuracies."""
    figure, (left, middle, right) = drawing.panels(3)
    drawing.band(left, GRADIENTS_AT, result.constant_gradient, 1, "pixels constant in the batch")
    drawing.band(left, GRADIENTS_AT, result.varying_gradient, 0, "pixels that vary")
    left.set(title="Largest gradient", xlabel="epsilon", xscale="log", yscale="log")
    lit = result.variance > 0
    line = np.logspace(-6, -0.5, 50)
    for number, (epsilon, values) in enumerate(zip(DEVIATIONS_AT, result.deviation, strict=True)):
        color, marker = drawing.COLORS[number], drawing.MARKERS[number]
        label = f"epsilon {epsilon:.0e}"
        middle.plot(result.variance[lit], values[lit], marker, color=color, label=label, ms=3.5)
        middle.plot(line, np.sqrt(line / (line + epsilon)), color=color, linewidth=0.8)
    middle.set(title="Deviation after the layer", xlabel="variance of a pixel", xscale="log")
    drawing.band(right, result.train_at.tolist(), result.test_loss, 1, "cross-entropy")
    drawing.band(right, result.train_at.tolist(), 1 - result.accuracy, 0, "share of errors")
    right.set(
        title="Test loss and errors", xlabel="epsilon in training", xscale="log", yscale="log"
    )
    for ax in (left, middle, right):
        drawing.legend_below(ax)
    return figure
