"""1. Why is there an epsilon in the denominator?

Because a feature can be constant in a batch. Its variance is then zero, and without epsilon its
output is 0 / 0. With epsilon the output is the bias, and the derivative of the output is at most
scale / sqrt(epsilon). Epsilon is also the variance below which the layer stops normalizing: the
output of a feature of variance v has the standard deviation sqrt(v / (v + epsilon)). So a feature
that is nearly constant, and mostly noise, is not scaled up to the size of the others.

Predictions: gradients of constant features grow without bound as epsilon goes to 0; networks learn
worse with a tiny epsilon; networks learn worse with a huge epsilon.
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
    """The network after a batch norm of the image, whose features are the 64 pixels.

    Some pixels are constant in most batches, and four are constant in all training images. Epsilon
    is read from the state, so that all its values share one compiled step. These trainings are
    short, and a momentum of 0.8 forgets the initial variance of one in half the time of 0.9.
    """

    widths: Sequence[int]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        epsilon = self.variable("batch_stats", "epsilon", lambda: jnp.float32(USUAL)).value
        norm = partial(pytorch_norm, epsilon=epsilon, momentum=0.8)
        x = norm(use_running_average=not train, axis=(1, 2, 3))(images)
        return ConvNet(widths=self.widths, norm=norm)(x, train, mask)


class Result(NamedTuple):
    """What was measured.

    Attributes:
      constant: the number of pixels that are constant in each seed's batch, (seeds,).
      nan_without: the number of pixels whose output is NaN with an epsilon of 0, (seeds,).
      off_bias: the largest distance of a constant pixel's output from the bias.
      constant_gradient: the largest gradient with respect to constant pixels, at each of
        `GRADIENTS_AT`, (epsilons, seeds).
      varying_gradient: the same for pixels whose variance is above a hundredth.
      variance: the variance of each pixel in all training images, in ascending order, (pixels,).
      deviation: the standard deviation of each normalized pixel, at each of `DEVIATIONS_AT`,
        (epsilons, pixels).
      train_at: the values of epsilon that networks were trained with, (epsilons,).
      test_loss, accuracy: the scores of these networks on the test set, (epsilons, seeds).
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
    """Normalize pixels with many values of epsilon, and train networks with some of them."""
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
    """Return the first five values of a `Result`, for one batch."""
    constant = batch.var(0) == 0
    varying = batch.var(0) > 1e-2
    # The formula without epsilon.
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
    """Return the p of "the gradient of constant pixels is proportional to epsilon to the p"."""
    logs = np.log(result.constant_gradient.mean(1))
    return float(np.polyfit(np.log(GRADIENTS_AT), logs, 1)[0])


def verdicts(result: Result) -> list[Verdict]:
    """Compare the predictions with what was measured."""
    p = exponent(result)
    usual = result.accuracy[result.train_at == USUAL].mean()
    tiny, huge = result.accuracy[0].mean(), result.accuracy[-1].mean()
    loss, usual_loss = result.test_loss[0].mean(), result.test_loss[result.train_at == USUAL].mean()
    return [
        Verdict(
            "some features are constant in a batch, and without epsilon their outputs are NaN",
            f"{common.spread(result.constant, '.0f')} of 64 pixels are constant, and "
            f"{common.spread(result.nan_without, '.0f')} are NaN without epsilon",
            bool(result.constant.min() > 0 and (result.nan_without == result.constant).all()),
        ),
        Verdict(
            "gradients of constant features grow without bound as epsilon goes to 0",
            f"like epsilon to the {p:.3f}",
            p <= -0.25,
        ),
        Verdict(
            f"with epsilon {result.train_at[0]:.0e} the test loss is over 10 % higher than with "
            f"{USUAL:.0e}",
            f"{loss:.2g} and {usual_loss:.2g}",
            bool(loss > 1.1 * usual_loss),
        ),
        *(
            Verdict(
                f"with epsilon {epsilon:.0e} the test accuracy is over 1 % lower than with "
                f"{USUAL:.0e}",
                f"{accuracy:.1%} and {usual:.1%}",
                bool(accuracy < usual - 0.01),
            )
            for epsilon, accuracy in zip(result.train_at[[0, -1]], (tiny, huge), strict=True)
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Return the tables of gradients, deviations and test results."""
    rows = zip(GRADIENTS_AT, result.constant_gradient, result.varying_gradient, strict=True)
    gradients = drawing.table(
        "Largest gradient with respect to pixels: mean (smallest to largest of the seeds)",
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
    """Plot gradients, deviations and test results against epsilon."""
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
