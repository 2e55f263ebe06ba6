"""6. How does batch size relate to its regularizing effect?

The mean of a batch of N is the mean of all plus noise of variance proportional to 1 / N: each image
is normalized by statistics that depend on its company, which acts like noise that is injected into
every layer. Smaller batches have more of it, and up to a point generalize better. Batch size also
sets the noise of the gradient, and few images in both only hurt. Ghost batches (statistics over N,
one gradient over all) have the first noise without the second.

What would have contradicted it: noise that does not fall like 1 / N; a gap between test and
training loss that ghost batches leave as it is.
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

# The whole training set of these networks, small enough to be learned by heart.
WHOLE = 128
SIZES = (4, 8, 16, 32, 64)
ARMS = ("statistics and gradient", "statistics: ghost batches", "gradient")
RATE = 0.1


class Result(NamedTuple):
    """What was measured.

    Attributes:
      noise_at, noise, law: as of `noise.Noise`.
      sizes: N.
      train_loss, test_loss, accuracy: of networks where N images make what an arm says, and all
        make the rest, (arms, sizes, seeds); on their training set, and on the test set.
      whole: the same three of networks where all images make both, (3, seeds).
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
    """Measures the noise, then trains with either noise, both and none."""
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
        # The images that are normalized together, or in ghost batches; those of them that count.
        together, counted = (size, size) if arm == 0 else (WHOLE, size if arm == 2 else WHOLE)
        state = _train(common.start(model, seed, RATE), steps, seed, together, counted)
        scores[:, *index] = evaluate(state, seed)
    whole = [
        evaluate(_train(common.start(plain, seed, RATE), steps, seed, WHOLE, WHOLE), seed)
        for seed in seeds
    ]
    train_loss, test_loss, accuracy = scores
    return Result(*found, sizes, train_loss, test_loss, accuracy, np.array(whole).T)


def subset(seed: int) -> np.ndarray:
    """The training set of a seed, as indices."""
    return np.random.default_rng(seed).permutation(len(common.digits().train_images))[:WHOLE]


@jax.jit
def _step(
    state: TrainState, images: ArrayLike, labels: ArrayLike, weights: ArrayLike
) -> TrainState:
    """A step on the weighted mean of the images' losses."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        losses, (_, statistics) = forward(params, state.batch_stats, state.apply_fn, images, labels)
        return jnp.vdot(weights, losses), statistics

    gradient, statistics = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradient, batch_stats=statistics)


def _train(state: TrainState, steps: int, seed: int, together: int, counted: int) -> TrainState:
    """Normalizes so many images together, and learns from the first of them.

    The rate falls to zero, so that what is compared is where a noise led, not its last kick.
    """
    own = subset(seed)
    images, labels = common.digits().train_images[own], common.digits().train_labels[own]
    weights = np.where(np.arange(together) < counted, 1 / counted, 0).astype(np.float32)
    for step, batch in enumerate(common.batches(steps, seed, together, of=WHOLE)):
        state = common.with_rate(state, RATE * (1 - step / steps))
        state = _step(state, images[batch], labels[batch], weights)
    return state


def _evaluation(model: ConvNet) -> Callable[[TrainState, int], tuple[float, float, float]]:
    """Training loss, test loss and accuracy, by the statistics of the whole training set.

    They are exact, so that the noise of moving averages does not enter.
    """
    forgetful = ConvNet(widths=model.widths, norm=partial(pytorch_norm, momentum=0.0))
    exact = jax.jit(partial(forgetful.apply, train=True, mutable=["batch_stats"]))

    def evaluate(state: TrainState, seed: int) -> tuple[float, float, float]:
        own = subset(seed)
        images, labels = common.digits().train_images[own], common.digits().train_labels[own]
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        statistics = exact(variables, images)[1]["batch_stats"]
        # In evaluation ghost batches play no part, and one compiled function serves all networks.
        state = state.replace(apply_fn=model.apply, batch_stats=statistics)
        test = common.test_score(state)
        return common.score(state, images, labels).loss, test.loss, test.accuracy

    return evaluate


def gap(result: Result) -> np.ndarray:
    """Test loss less training loss, over that of the whole batch with the same seed."""
    return (result.test_loss - result.train_loss) / (result.whole[1] - result.whole[0])


def verdicts(result: Result) -> list[Verdict]:
    """What would have contradicted the answer."""
    gaps = gap(result)
    ghost, gradient = gaps[1].mean(-1), gaps[2].mean(-1)
    least = int(np.argmin(ghost))
    errors = 1 - result.accuracy[1].mean(-1)
    best = int(np.argmin(errors))
    whole = 1 - result.whole[2].mean()
    p = noise.exponent(noise.Noise(result.noise_at, result.noise, result.law))
    return [
        Verdict(
            abs(p + 1) > 0.05, "noise did not fall like 1 / N", f"it falls like N to the {p:.3f}"
        ),
        Verdict(
            bool(gaps[1, least].max() >= 1),
            "no size of ghost batches had a smaller gap than the whole batch in every seed",
            f"{common.spread(gaps[1, least], '.2f')} of it at {result.sizes[least]}",
        ),
        Verdict(
            bool(ghost[0] >= ghost[-1]),
            "the gap were not smaller with the smallest ghost batches than with the largest",
            f"{ghost[0]:.2f} against {ghost[-1]:.2f} of the whole batch's",
        ),
        Verdict(
            bool(gradient.min() <= ghost.min()),
            "the gradient's noise alone made the gap as small",
            f"{gradient.min():.2f} against {ghost.min():.2f} of it at best",
        ),
        Verdict(
            bool(errors[best] >= whole),
            "no size of ghost batches had fewer test errors than the whole batch",
            f"{errors[best]:.1%} at {result.sizes[best]} against {whole:.1%}",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """The noise, then the networks."""
    rows = zip(result.noise_at, result.noise, result.law, strict=True)
    of_noise = drawing.table(
        "Variance of a batch's mean over an image's, mean (least to largest of the seeds)",
        ("N", "measured", "by law"),
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
                f"{WHOLE}, the whole",
                *(common.spread(v, ".3f") for v in (train, test)),
                "1",
                common.spread(accuracy, ".1%"),
            )
        )
        networks.append(drawing.table(f"N images make: {name}", columns, rows))
    return [of_noise, *networks]


def plot(result: Result) -> Figure:
    """The noise, the gap, the errors."""
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
