"""6. How does batch size relate to its regularizing effect?

The mean of a batch of N images is the mean of all images plus noise, whose variance is proportional
to 1 / N. Each image is normalized by statistics that depend on the other images in its batch, which
acts like noise in every layer. Smaller batches have more of it and, up to a point, generalize
better. The batch size also sets the noise of the gradient, and too few images for both only hurt.
Ghost batches (statistics of N images, one gradient of all) have the first noise without the second.

Predictions: the noise falls like 1 / N; ghost batches reduce the gap between test and training
loss, and the noise of the gradient alone reduces it less.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from train_examples.common.model import ConvNet, pytorch_norm
from train_examples.common.training import forward
from train_examples.digits.train import TrainState
from train_examples.questions import common, drawing, noise
from train_examples.questions.common import Settings, Verdict

# The size of these networks' training set, small enough to overfit.
WHOLE = 128
SIZES = (4, 8, 16, 32, 64)
ARMS = ("statistics and gradient", "statistics: ghost batches", "gradient")
RATE = 0.1


class Result(NamedTuple):
    """What was measured.

    Attributes:
      noise_at, noise, law: the fields of `noise.Noise`.
      sizes: the values of N.
      train_loss, test_loss, accuracy: the scores of networks on their training set, and on the test
        set, (arms, sizes, seeds). An arm says what is computed from N images; the rest is computed
        from all.
      whole: the same three scores if both are computed from all images, (3, seeds).
    """

    noise_at: np.ndarray
    noise: np.ndarray
    law: np.ndarray
    sizes: np.ndarray
    train_loss: np.ndarray
    test_loss: np.ndarray
    accuracy: np.ndarray
    whole: np.ndarray


def run(settings: Settings) -> Result:
    """Measure the noise, then train networks with either kind of noise, both and neither."""
    seeds = range(settings.seeds)
    found = noise.noise(np.array(settings.pick(noise.SIZES, (16, 64))), settings.seeds)
    sizes = np.array(settings.pick(SIZES, (8, 32)))
    steps = settings.pick(150, 3)
    shape = (len(ARMS), len(sizes), settings.seeds)
    scores = np.empty((3, *shape))
    plain = ConvNet(widths=settings.widths)
    ghosts = [
        ConvNet(widths=plain.widths, norm=partial(pytorch_norm, virtual_batch_size=int(size)))
        for size in sizes
    ]
    evaluate = _evaluation(plain)
    for index in track(list(product(*map(range, shape))), "6: networks by batch size"):
        arm, row, seed = index
        size = int(sizes[row])
        model = ghosts[row] if arm == 1 else plain
        # How many images form a batch, and how many of them count in the loss.
        together, counted = (size, size) if arm == 0 else (WHOLE, size if arm == 2 else WHOLE)
        # Ghost batches do not change the initial state, so all networks share a compiled start.
        state = common.start(plain, seed, RATE).replace(apply_fn=model.apply)
        state = _train(state, steps, seed, together, counted)
        scores[:, *index] = evaluate(state, seed)
    whole = [
        evaluate(_train(common.start(plain, seed, RATE), steps, seed, WHOLE, WHOLE), seed)
        for seed in seeds
    ]
    train_loss, test_loss, accuracy = scores
    return Result(*found, sizes, train_loss, test_loss, accuracy, np.array(whole).T)


def subset(seed: int) -> np.ndarray:
    """Return the indices of the training set of a seed."""
    return np.random.default_rng(seed).permutation(len(common.digits().train_images))[:WHOLE]


@jax.jit
def _step(
    state: TrainState, images: ArrayLike, labels: ArrayLike, weights: ArrayLike
) -> TrainState:
    """Take a step on the weighted mean of the images' losses."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        losses, (_, statistics) = forward(params, state.batch_stats, state.apply_fn, images, labels)
        return jnp.vdot(weights, losses), statistics

    gradient, statistics = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradient, batch_stats=statistics)


def _train(state: TrainState, steps: int, seed: int, together: int, counted: int) -> TrainState:
    """Train on batches of `together` images, of which the first `counted` count in the loss.

    The learning rate falls to zero, so that the noise of the last steps has little effect.
    """
    own = subset(seed)
    images, labels = common.digits().train_images[own], common.digits().train_labels[own]
    weights = np.where(np.arange(together) < counted, 1 / counted, 0).astype(np.float32)
    for step, batch in enumerate(common.batches(steps, seed, together, of=WHOLE)):
        state = common.with_rate(state, RATE * (1 - step / steps))
        state = _step(state, images[batch], labels[batch], weights)
    return state


def _evaluation(model: ConvNet) -> Callable[[TrainState, int], tuple[float, float, float]]:
    """Return a function of a state and a seed: training loss, test loss and test accuracy.

    The function uses the exact statistics of the whole training set, so that the noise of moving
    averages has no effect.
    """
    without_memory = ConvNet(widths=model.widths, norm=partial(pytorch_norm, momentum=0.0))
    exact = jax.jit(partial(without_memory.apply, train=True, mutable=["batch_stats"]))

    def evaluate(state: TrainState, seed: int) -> tuple[float, float, float]:
        own = subset(seed)
        images, labels = common.digits().train_images[own], common.digits().train_labels[own]
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        statistics = exact(variables, images)[1]["batch_stats"]
        # Ghost batches do not matter in evaluation, so one compiled function serves all networks.
        state = state.replace(apply_fn=model.apply, batch_stats=statistics)
        test = common.test_score(state)
        return common.score(state, images, labels).loss, test.loss, test.accuracy

    return evaluate


def gap(result: Result) -> np.ndarray:
    """Return test loss minus training loss, over that of the whole batch with the same seed."""
    return (result.test_loss - result.train_loss) / (result.whole[1] - result.whole[0])


def verdicts(result: Result) -> list[Verdict]:
    """Compare the predictions with what was measured."""
    gaps = gap(result)
    ghost, gradient = gaps[1].mean(-1), gaps[2].mean(-1)
    smallest = int(np.argmin(ghost))
    errors = 1 - result.accuracy[1].mean(-1)
    best = int(np.argmin(errors))
    whole = 1 - result.whole[2].mean()
    p = noise.exponent(noise.Noise(result.noise_at, result.noise, result.law))
    return [
        Verdict("noise falls like 1 / N", f"like N to the {p:.3f}", abs(p + 1) <= 0.05),
        Verdict(
            "some size of ghost batches has a smaller gap than the whole batch in every seed",
            f"{common.spread(gaps[1, smallest], '.2f')} of it at {result.sizes[smallest]}",
            bool(gaps[1, smallest].max() < 1),
        ),
        Verdict(
            "the gap is smaller with the smallest ghost batches than with the largest",
            f"{ghost[0]:.2f} and {ghost[-1]:.2f} of the whole batch's",
            bool(ghost[0] < ghost[-1]),
        ),
        Verdict(
            "the gradient's noise alone leaves a larger gap than ghost batches",
            f"{gradient.min():.2f} and {ghost.min():.2f} of the whole batch's at best",
            bool(gradient.min() > ghost.min()),
        ),
        Verdict(
            "some size of ghost batches has fewer test errors than the whole batch",
            f"{errors[best]:.1%} at {result.sizes[best]}, and {whole:.1%}",
            bool(errors[best] < whole),
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Return the table of the noise, and one of the networks of each arm."""
    rows = zip(result.noise_at, result.noise, result.law, strict=True)
    of_noise = drawing.table(
        "Variance of a batch's mean over an image's, mean (smallest to largest of the seeds)",
        ("N", "measured", "predicted"),
        [(str(n), common.spread(a, ".4f"), f"{b:.4f}") for n, a, b in rows],
    )
    columns = ("N", "training loss", "test loss", "gap over the whole batch's", "test accuracy")
    networks = []
    for arm, name in enumerate(ARMS):
        cells = zip(
            *(result.sizes, result.train_loss[arm], result.test_loss[arm]),
            *(gap(result)[arm], result.accuracy[arm]),
            strict=True,
        )
        rows = [
            (
                str(n),
                *(common.spread(v, ".3f") for v in (train, test)),
                common.spread(share, ".2f"),
                common.spread(a, ".1%"),
            )
            for n, train, test, share, a in cells
        ]
        train, test, accuracy = result.whole
        rows.append(
            (
                f"{WHOLE}, the whole batch",
                *(common.spread(v, ".3f") for v in (train, test)),
                "1",
                common.spread(accuracy, ".1%"),
            )
        )
        networks.append(drawing.table(f"Computed from N images: {name}", columns, rows))
    return [of_noise, *networks]


def plot(result: Result) -> Figure:
    """Plot the noise, the gap and the test errors against N."""
    figure, (left, middle, right) = drawing.panels(3)
    drawing.band(left, result.noise_at.tolist(), result.noise, 0, "measured")
    left.plot(result.noise_at, result.law, color="black", linewidth=0.8, label="law")
    left.set(title="Variance of a batch's mean", ylabel="of one image's", yscale="log")
    for arm, name in enumerate(ARMS):
        drawing.band(middle, result.sizes.tolist(), gap(result)[arm], arm, name)
        errors = 100 * (1 - result.accuracy[arm])
        drawing.band(right, result.sizes.tolist(), errors, arm, name)
    middle.axhline(1, color="gray", linestyle=":", label="the whole batch")
    whole = 100 * (1 - result.whole[2].mean())
    right.axhline(whole, color="gray", linestyle=":", label="the whole batch")
    middle.set(title="Gap of test and training loss", ylabel="of the whole batch's")
    right.set(title="Test errors (%)")
    for ax in (left, middle, right):
        ax.set_xscale("log", base=2)
        ax.set_xlabel("images N")
        drawing.legend_below(ax)
    return figure
