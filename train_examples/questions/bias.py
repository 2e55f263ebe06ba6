"""3. Is a bias needed in the layer before?

No. A constant that is added to a feature everywhere is part of its mean, and is subtracted with it.
In training the output does not depend on the bias, and the gradient of the bias is zero. The
normalization's own bias replaces it. In evaluation, where the moving averages are fixed, the output
does depend on the bias.

Predictions: in training the gradient of the bias is zero up to rounding, and in evaluation it is
not; training with biases and training without reach the same function up to rounding. A third run,
whose first kernel differs from the others' in the last digit, measures the effect of rounding.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from train_examples.common.model import ConvNet, pytorch_norm
from train_examples.common.training import loss_fn
from train_examples.digits.train import TrainState
from train_examples.questions import common, drawing
from train_examples.questions.common import Settings, Verdict

LEARNING_RATE = 0.1
DTYPES = ("float64", "float32")
POINTS = 10


class Result(NamedTuple):
    """What was measured.

    Attributes:
      gradient: the largest gradient of a bias over the largest gradient of a kernel, in float64:
        with batch norm in training, with batch norm in evaluation, and without batch norm,
        (3, seeds).
      steps: the numbers of steps after which the functions were compared.
      difference: the largest difference of test logits from a run without biases, over the largest
        logit, (dtypes, changes, steps, seeds). The changes are: with biases, and with another last
        digit in a kernel.
    """

    gradient: np.ndarray
    steps: np.ndarray
    difference: np.ndarray


def run(settings: Settings) -> Result:
    """Measure the gradients of biases, then compare trainings with and without biases."""
    seeds = range(settings.seeds)
    with jax.enable_x64(True):
        gradient = np.array([_gradients(settings, seed) for seed in track(seeds, "3: gradients")]).T
    steps = np.unique(np.linspace(0, settings.epochs(5), settings.pick(POINTS, 2) + 1).astype(int))
    models = [ConvNet(widths=settings.widths, use_bias=with_bias) for with_bias in (False, True)]
    dtypes = settings.pick(DTYPES, DTYPES[:1])
    difference = np.empty((len(dtypes), 2, len(steps), settings.seeds))
    for row, dtype in enumerate(dtypes):
        with jax.enable_x64(dtype == "float64"):
            for seed in track(seeds, f"3: trainings in {dtype}"):
                difference[row, ..., seed] = _differences(models, dtype, steps, seed)
    return Result(gradient, steps, difference)


def with_biases(state: TrainState, seed: int) -> TrainState:
    """Return the state with random biases in the convolutions, as zeros could hide an effect."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: jax.Array) -> jax.Array:
        names = [part.key for part in path]
        if names[0].startswith("Conv") and names[-1] == "bias":
            return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return leaf

    return state.replace(params=jax.tree_util.tree_map_with_path(fill, state.params))


def _gradients(settings: Settings, seed: int) -> list[float]:
    """Return the ratios of gradients in `Result.gradient` for one seed."""
    batch = next(common.batches(1, seed))
    images = common.digits().train_images[batch].astype(np.float64)
    labels = common.digits().train_labels[batch]
    normed = ConvNet(widths=settings.widths, use_bias=True)

    def ratio(model: ConvNet, apply: Any, statistics: Any = None) -> tuple[float, Any]:
        state = with_biases(common.start(model, seed, LEARNING_RATE, dtype=jnp.float64), seed)
        gradient = jax.jit(jax.grad(loss_fn, has_aux=True), static_argnums=2)
        of, (_, new) = gradient(
            state.params, statistics or state.batch_stats, apply, images, labels
        )
        layers = [layer for name, layer in of.items() if name.startswith("Conv")]
        largest = {k: max(jnp.abs(layer[k]).max() for layer in layers) for k in ("bias", "kernel")}
        return float(largest["bias"] / largest["kernel"]), new

    double = normed.clone(dtype=jnp.float64, norm=partial(pytorch_norm, momentum=0.0))
    training, statistics = ratio(normed, double.apply)
    # With the statistics of the same batch, which are now constants.
    evaluation, _ = ratio(normed, partial(_in_evaluation, double), statistics)
    without = common.plain(settings.widths)
    return [training, evaluation, ratio(without, without.clone(dtype=jnp.float64).apply)[0]]


def _in_evaluation(model: ConvNet, variables: Any, images: jax.Array, **_: Any) -> Any:
    return model.apply(variables, images, train=False), {}


def _differences(models: list[ConvNet], dtype: DTypeLike, steps: np.ndarray, seed: int) -> Any:
    """Return the differences from the run without biases, (changes, steps), for one seed."""
    without, with_bias = (model.clone(dtype=jnp.dtype(dtype)) for model in models)
    reference = common.start(without, seed, LEARNING_RATE, dtype=dtype)
    biased = with_biases(common.start(with_bias, seed, LEARNING_RATE, dtype=dtype), seed)
    params: Any = reference.params
    kernel = params["Conv_0"]["kernel"]
    nudged = {**params, "Conv_0": {"kernel": kernel * (1 + jnp.finfo(dtype).eps)}}
    # A layer's bias does not change the random seed of its kernel.
    np.testing.assert_array_equal(biased.params["Conv_0"]["kernel"], kernel)
    outputs = [
        _outputs(state, steps, seed)
        for state in (reference, biased, reference.replace(params=nudged))
    ]
    largest = np.abs(outputs[0]).max((1, 2))
    return [np.abs(other - outputs[0]).max((1, 2)) / largest for other in outputs[1:]]


def _outputs(state: TrainState, steps: np.ndarray, seed: int) -> np.ndarray:
    """Return logits of the test images after each of `steps`, with the images' own statistics.

    The moving means start at zero for any biases, and would need time to adapt to them.
    """
    outputs, count = [], 0

    def follow(state: TrainState) -> None:
        nonlocal count
        if count in steps:
            outputs.append(np.asarray(common.batch_logits(state, common.digits().test_images)))
        count += 1

    follow(state)
    common.train(state, int(steps[-1]), seed, follow)
    return np.array(outputs)


def verdicts(result: Result) -> list[Verdict]:
    """Compare the predictions with what was measured."""
    training, evaluation, plain = result.gradient
    # The rounding of sums of some thousand terms is far below this in float64.
    bound = 1e-12
    biases, nudge = result.difference[:, :, -1].max(-1).T
    measured = ", ".join(
        f"{b:.0e} and {n:.0e} in {dtype}"
        for dtype, b, n in zip(DTYPES, biases, nudge, strict=False)
    )
    return [
        Verdict(
            f"in training, a bias has at most {bound:.0e} of a kernel's gradient in float64",
            f"at most {training.max():.1e}; without batch norm at least {plain.min():.1e}",
            bool(training.max() <= bound),
        ),
        Verdict(
            "runs with and without biases differ by at most 100 times as much as runs that start "
            "with another last digit",
            measured,
            bool((biases <= 100 * nudge).all()),
        ),
        Verdict(
            f"in evaluation, a bias has more than {bound:.0e} of a kernel's gradient",
            f"at least {evaluation.min():.1e}",
            bool(evaluation.min() > bound),
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Return the tables of gradients and of differences between trainings."""
    names = ("batch norm, training", "batch norm, evaluation", "no batch norm")
    gradients = drawing.table(
        "Largest gradient of a bias over that of a kernel, float64",
        ("network", "mean (smallest to largest of the seeds)"),
        [(n, common.spread(g, ".1e")) for n, g in zip(names, result.gradient, strict=True)],
    )
    differences = drawing.table(
        "Test logits' largest difference from a run without biases, over the largest logit",
        ("type", "after steps", "with biases", "kernel with another last digit"),
        [
            (
                dtype,
                str(step),
                common.spread(result.difference[row, 0, column], ".1e"),
                common.spread(result.difference[row, 1, column], ".1e"),
            )
            for row, dtype in enumerate(DTYPES[: len(result.difference)])
            for column, step in enumerate(result.steps)
            if column in (0, 1, len(result.steps) - 1)
        ],
    )
    return [gradients, differences]


def plot(result: Result) -> Figure:
    """Plot the difference from the run without biases, beside that caused by rounding."""
    figure, axes = drawing.panels(2)
    for ax, dtype, values in zip(axes, DTYPES, result.difference, strict=False):
        drawing.band(ax, result.steps.tolist(), values[0], 1, "with random biases")
        drawing.band(ax, result.steps.tolist(), values[1], 0, "a kernel's last digit changed")
        ax.set(title=dtype, xlabel="training step", yscale="log")
        drawing.legend_below(ax)
    axes[0].set_ylabel("difference of test logits / largest")
    figure.suptitle("How far from a run without biases", fontsize=11)
    return figure
