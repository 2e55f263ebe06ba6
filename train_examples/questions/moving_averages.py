"""2. Why moving averages at test time?

Because the prediction for one image must not depend on the other images in its batch. With the
batch's own statistics it does, and the accuracy drops when the others are few or not typical. The
moving averages depend on the training data alone. Their momentum trades off two errors: the weight
of the initial value (0 or 1) is momentum to the number of steps, and the noise of the last batches
is multiplied by sqrt((1 - momentum) / (1 + momentum)). While the parameters change there is a third
error: the averages lag behind.

Predictions: batches of one image, or of one class, are classified worse with their own statistics
than with the moving averages; the error of the averages is smallest at a momentum between the
extremes.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from train_examples.common.model import ConvNet, pytorch_norm
from train_examples.digits.train import TrainState
from train_examples.questions import common, dealing, drawing
from train_examples.questions.common import Settings, Verdict
from train_examples.questions.momentum import COUNT, errors

SIZES = (1, 2, 4, 8, 20, 72, 360)
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
MOMENTA = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
LEARNING_RATE = 0.1


class Result(NamedTuple):
    """What was measured.

    Attributes:
      sizes: the sizes of test batches.
      by_size: the accuracy with each batch's own statistics, (sizes, seeds).
      changed: the share of predictions that differ between two random splits of the test images
        into batches, (sizes, seeds).
      moving: the accuracy with the moving averages, (seeds,).
      shares: the shares of one class in a test batch.
      by_share, moving_by_share: the accuracy of these batches with their own statistics and with
        the moving averages, (shares, seeds).
      momenta: the weights of the old value.
      by_momentum: the accuracy with moving averages of each momentum, (momenta, seeds).
      at_rest: the same after as many further steps with a learning rate of zero.
      bias, noise, bias_law, noise_law: the fields of `momentum.Errors`, (momenta,).
    """

    sizes: np.ndarray
    by_size: np.ndarray
    changed: np.ndarray
    moving: np.ndarray
    shares: np.ndarray
    by_share: np.ndarray
    moving_by_share: np.ndarray
    momenta: np.ndarray
    by_momentum: np.ndarray
    at_rest: np.ndarray
    bias: np.ndarray
    noise: np.ndarray
    bias_law: np.ndarray
    noise_law: np.ndarray


@jax.jit
def _advance(averages: Any, latest: Any, momenta: jax.Array) -> Any:
    """Update moving averages of several momenta at once."""

    def step(average: jax.Array, new: jax.Array) -> jax.Array:
        weight = momenta.reshape(-1, *(1,) * new.ndim)
        return weight * average + (1 - weight) * new

    return jax.tree.map(step, averages, latest)


def run(settings: Settings) -> Result:
    """Train a network for each seed, and test it with each kind of statistics."""
    sizes = np.array(settings.pick(SIZES, (2, 360)))
    shares = np.array(settings.pick(SHARES, (0.1, 1.0)))
    momenta = np.array(settings.pick(MOMENTA, (0.0, 0.9, 0.999)))
    # The averages do not affect training, so one run serves all momenta. With a momentum of 0 the
    # state holds the last batch's statistics, which are averaged here.
    model = ConvNet(widths=settings.widths, norm=partial(pytorch_norm, momentum=0.0))
    at_default = int(np.flatnonzero(momenta == common.MOMENTUM)[0])
    found = []
    for seed in track(range(settings.seeds), "2: networks by seed"):
        state = common.start(model, seed, LEARNING_RATE)
        averages = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(momenta)), state.batch_stats)
        state, averages = _train(state, averages, momenta, settings.epochs(5), seed)
        by_momentum = _accuracies(state, averages)
        _, settled = _train(common.with_rate(state, 0), averages, momenta, settings.epochs(5), seed)
        default = jax.tree.map(lambda leaf: leaf[at_default], averages)
        state = state.replace(batch_stats=default)
        by_size = [dealing.by_size(state, size, seed) for size in sizes]
        by_share = [dealing.by_share(state, share, seed) for share in shares]
        found.append(
            (
                *(*zip(*by_size, strict=True), by_momentum[at_default]),
                *(*zip(*by_share, strict=True), by_momentum, _accuracies(state, settled)),
            )
        )
    columns = [np.array(column).T for column in zip(*found, strict=True)]
    by_size, changed, moving, by_share, moving_by_share, by_momentum, at_rest = columns
    law = [errors(float(momentum)) for momentum in track(momenta, "2: errors by momentum")]
    return Result(
        *(sizes, by_size, changed, moving, shares, by_share, moving_by_share),
        *(momenta, by_momentum, at_rest, *np.array(law).T),
    )


def _train(
    state: TrainState, averages: Any, momenta: np.ndarray, steps: int, seed: int
) -> tuple[TrainState, Any]:
    """Return the state and the moving averages of each momentum after `steps` steps."""
    weights = jnp.asarray(momenta, jnp.float32)

    def follow(state: TrainState) -> None:
        nonlocal averages
        averages = _advance(averages, state.batch_stats, weights)

    return common.train(state, steps, seed, follow), averages


def _accuracies(state: TrainState, averages: Any) -> list[float]:
    """Return the test accuracy with the averages of each momentum."""
    count = len(jax.tree.leaves(averages)[0])
    each = (jax.tree.map(lambda leaf, row=row: leaf[row], averages) for row in range(count))
    return [common.test_score(state.replace(batch_stats=own)).accuracy for own in each]


def verdicts(result: Result) -> list[Verdict]:
    """Compare the predictions with what was measured."""
    moving, single = result.moving.mean(), result.by_size[0].mean()
    pure, pure_moving = result.by_share[-1].mean(), result.moving_by_share[-1].mean()
    total = np.hypot(result.bias, result.noise)
    best = int(np.argmin(total))
    at_default = int(np.flatnonzero(result.momenta == common.MOMENTUM)[0])
    deviation = np.abs(result.noise / result.noise_law - 1).max()
    return [
        Verdict(
            f"the accuracy of test batches of {result.sizes[0]} with their own statistics is over "
            f"1 % lower than with the moving averages",
            f"{single:.1%} and {moving:.1%}",
            bool(single < moving - 0.01),
        ),
        Verdict(
            "the accuracy of batches of one class with their own statistics is over 1 % lower than "
            "with the moving averages",
            f"{pure:.1%} and {pure_moving:.1%}",
            bool(pure < pure_moving - 0.01),
        ),
        Verdict(
            f"the error after {COUNT} batches is smallest at a momentum between "
            f"{result.momenta[0]:g} and {result.momenta[-1]:g}",
            f"it is smallest at {result.momenta[best]:g}",
            best not in (0, len(total) - 1),
        ),
        Verdict(
            "after training, the accuracy with the last batch's statistics is lower than with the "
            "moving averages",
            f"{result.by_momentum[0].mean():.1%} and {moving:.1%}; after further steps with the "
            f"parameters fixed {result.at_rest[0].mean():.1%} and "
            f"{result.at_rest[at_default].mean():.1%}",
            bool(result.by_momentum[0].mean() < moving),
        ),
        Verdict(
            "the noise is sqrt((1 - momentum) / (1 + momentum)) of a batch's, within 10 %",
            f"it differs by {deviation:.1%} at most",
            bool(deviation <= 0.1),
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Return the tables by the size of test batches, by their mixture and by momentum."""
    by_size = drawing.table(
        f"Test accuracy; with the moving averages it is {common.spread(result.moving, '.1%')}",
        ("test batch", "with its own statistics", "predictions that change in another split"),
        [
            (str(n), common.spread(a, ".1%"), common.spread(c, ".1%"))
            for n, a, c in zip(result.sizes, result.by_size, result.changed, strict=True)
        ],
    )
    rows = zip(result.shares, result.by_share, result.moving_by_share, strict=True)
    by_share = drawing.table(
        f"Test accuracy of batches of {dealing.MIXED_SIZE}",
        ("share of one class", "with their own statistics", "with the moving averages"),
        [(f"{s:.0%}", common.spread(a, ".1%"), common.spread(b, ".1%")) for s, a, b in rows],
    )
    rows = zip(
        *(result.momenta, result.by_momentum, result.at_rest),
        *(result.bias, result.bias_law, result.noise, result.noise_law),
        strict=True,
    )
    by_momentum = drawing.table(
        f"Accuracy with averages of each momentum; error of a pixel's moving mean after {COUNT} "
        f"batches, in deviations of a batch's mean: measured (predicted)",
        ("momentum", "test accuracy", "parameters fixed", "bias", "noise"),
        [
            (
                f"{m:g}",
                *(common.spread(accuracy, ".1%") for accuracy in accuracies),
                f"{b:.2f} ({bl:.2f})",
                f"{n:.3f} ({nl:.3f})",
            )
            for m, *accuracies, b, bl, n, nl in rows
        ],
    )
    return [by_size, by_share, by_momentum]


def plot(result: Result) -> Figure:
    """Plot the accuracy against size and mixture of test batches, and the error by momentum."""
    figure, (left, middle, right) = drawing.panels(3)
    moving = np.broadcast_to(result.moving, result.by_size.shape)
    drawing.band(left, result.sizes.tolist(), 100 * result.by_size, 1, "batch's own statistics")
    drawing.band(left, result.sizes.tolist(), 100 * moving, 0, "moving averages")
    left.set(title="Test accuracy (%)", xlabel="images in a test batch", xscale="log")
    shares = (100 * result.shares).tolist()
    drawing.band(middle, shares, 100 * result.by_share, 1, "batch's own statistics")
    drawing.band(middle, shares, 100 * result.moving_by_share, 0, "moving averages")
    middle.set(title=f"Batches of {dealing.MIXED_SIZE} (%)", xlabel="share of one class (%)")
    weights = 1 - result.momenta
    colors, markers = drawing.COLORS, drawing.MARKERS
    measured = (("bias", result.bias), ("noise", result.noise))
    for number, (name, values) in enumerate(measured, start=2):
        law = getattr(result, f"{name}_law")
        # The repeats are too noisy to measure a smaller bias.
        visible = law > 5e-3
        color, marker = colors[number], markers[number]
        right.plot(
            weights[visible], values[visible], marker, color=color, label=f"{name}, measured", ms=4
        )
        right.plot(weights[visible], law[visible], color=color, label=f"{name}, law", lw=1)
    right.set(
        title="Error of a moving mean",
        xlabel="1 - momentum",
        ylabel="deviations of a batch's mean",
        xscale="log",
        yscale="log",
    )
    for ax in (left, middle, right):
        drawing.legend_below(ax)
    return figure
