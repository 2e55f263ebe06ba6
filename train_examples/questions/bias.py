"""3. Is a bias needed in the layer before?

No. What is added to a feature everywhere is in its mean, and goes with it: in training the output
does not depend on the bias, whose gradient is zero. The normalization's own bias does what it
would do. In evaluation, with the moving averages held fixed, the bias does count.

What would have contradicted it: a gradient above rounding; training with biases ending at another
function than training without, by more than rounding explains. How far rounding alone carries is
measured by a third run, whose first kernel differs from the others' in the last digit.
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
      gradient: the largest gradient of a bias over the largest of a kernel, of networks with batch
        norm in training, of those in evaluation, and of those without batch norm; (3, seeds),
        float64.
      steps: after which the functions were compared.
      apart: the largest difference of test logits from a run without biases, over the largest
        logit, (dtypes, what differs, steps, seeds); what differs are biases, or the last digit of a
        kernel.
    """

    gradient: np.ndarray
    steps: np.ndarray
    apart: np.ndarray


def run(settings: Settings) -> Result:
    """Gradients, then trainings in pairs."""
    seeds = range(settings.seeds)
    with jax.enable_x64(True):
        gradient = np.array([_gradients(settings, seed) for seed in track(seeds, "3: gradients")]).T
    steps = np.unique(np.linspace(0, settings.epochs(5), settings.pick(POINTS, 2) + 1).astype(int))
    models = [ConvNet(widths=settings.widths, use_bias=with_bias) for with_bias in (False, True)]
    dtypes = settings.pick(DTYPES, DTYPES[:1])
    apart = np.empty((len(dtypes), 2, len(steps), settings.seeds))
    for row, dtype in enumerate(dtypes):
        with jax.enable_x64(dtype == "float64"):
            for seed in track(seeds, f"3: trainings in {dtype}"):
                apart[row, ..., seed] = _differences(models, dtype, steps, seed)
    return Result(gradient, steps, apart)


def with_biases(state: TrainState, seed: int) -> TrainState:
    """The state with convolutions' biases drawn at random, as zeros could hide what they do."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: jax.Array) -> jax.Array:
        names = [part.key for part in path]
        if names[0].startswith("Conv") and names[-1] == "bias":
            return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
        return leaf

    return state.replace(params=jax.tree_util.tree_map_with_path(fill, state.params))


def _gradients(settings: Settings, seed: int) -> list[float]:
    """The largest gradient of a bias over the largest of a kernel: training, evaluation, plain."""
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
    # By the very statistics that the batch has, now held fixed.
    evaluation, _ = ratio(normed, partial(_in_evaluation, double), statistics)
    without = common.plain(settings.widths)
    return [training, evaluation, ratio(without, without.clone(dtype=jnp.float64).apply)[0]]


def _in_evaluation(model: ConvNet, variables: Any, images: jax.Array, **_: Any) -> Any:
    return model.apply(variables, images, train=False), {}


def _differences(models: list[ConvNet], dtype: DTypeLike, steps: np.ndarray, seed: int) -> Any:
    """How far from the run without biases: with biases, and with another last digit."""
    without, with_bias = (model.clone(dtype=jnp.dtype(dtype)) for model in models)
    reference = common.start(without, seed, LEARNING_RATE, dtype=dtype)
    biased = with_biases(common.start(with_bias, seed, LEARNING_RATE, dtype=dtype), seed)
    params: Any = reference.params
    kernel = params["Conv_0"]["kernel"]
    nudged = {**params, "Conv_0": {"kernel": kernel * (1 + jnp.finfo(dtype).eps)}}
    # The same kernels: the biases' names do not enter the seeds of the others.
    np.testing.assert_array_equal(biased.params["Conv_0"]["kernel"], kernel)
    outputs = [
        _outputs(state, steps, seed)
        for state in (reference, biased, reference.replace(params=nudged))
    ]
    largest = np.abs(outputs[0]).max((1, 2))
    return [np.abs(other - outputs[0]).max((1, 2)) / largest for other in outputs[1:]]


def _outputs(state: TrainState, steps: np.ndarray, seed: int) -> np.ndarray:
    """Logits of the test images after some steps, by the statistics of the images themselves.

    The moving averages begin at zero, wherever the biases are, and take time to find them.
    """
    seen, count = [], 0

    def follow(state: TrainState) -> None:
        nonlocal count
        if count in steps:
            seen.append(np.asarray(_own_statistics(state, common.digits().test_images)))
        count += 1

    follow(state)
    common.train(state, int(steps[-1]), seed, follow)
    return np.array(seen)


@jax.jit
def _own_statistics(state: TrainState, images: jax.Array) -> jax.Array:
    logits, _ = state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    return logits


def verdicts(result: Result) -> list[Verdict]:
    """What would have contradicted the answer."""
    training, evaluation, plain = result.gradient
    # Sums of some thousand terms, each rounded: far below this in float64.
    bound = 1e-12
    biases, nudge = result.apart[:, 0, -1].max(-1), result.apart[:, 1, -1].max(-1)
    measured = ", ".join(
        f"{b:.0e} against {n:.0e} in {dtype}"
        for dtype, b, n in zip(DTYPES, biases, nudge, strict=False)
    )
    return [
        Verdict(
            bool(training.max() > bound),
            f"a bias had more than {bound:.0e} of a kernel's gradient in float64",
            f"{training.max():.1e}; without batch norm {plain.min():.1e} at least",
        ),
        Verdict(
            bool((biases > 100 * nudge).any()),
            "the functions parted 100 times further than runs that differ in a last digit",
            measured,
        ),
        Verdict(
            bool(evaluation.max() <= bound),
            "biases did not count in evaluation either",
            f"{evaluation.min():.1e} of a kernel's gradient at least",
        ),
    ]


def tables(result: Result) -> list[Table]:
    """Gradients, and differences at the end."""
    names = ("batch norm, training", "batch norm, evaluation", "no batch norm")
    gradients = drawing.table(
        "Largest gradient of a bias over that of a kernel, float64",
        ("network", "mean (least to largest of the seeds)"),
        [(n, common.spread(g, ".1e")) for n, g in zip(names, result.gradient, strict=True)],
    )
    differences = drawing.table(
        "Test logits' largest difference from a run without biases, over the largest logit",
        ("type", "after steps", "with biases", "kernel with another last digit"),
        [
            (
                dtype,
                str(step),
                common.spread(result.apart[row, 0, column], ".1e"),
                common.spread(result.apart[row, 1, column], ".1e"),
            )
            for row, dtype in enumerate(DTYPES[: len(result.apart)])
            for column, step in enumerate(result.steps)
            if column in (0, 1, len(result.steps) - 1)
        ],
    )
    return [gradients, differences]


def plot(result: Result) -> Figure:
    """How training with and without parts, as rounding does."""
    figure, axes = drawing.panels(2)
    for ax, dtype, values in zip(axes, DTYPES, result.apart, strict=False):
        drawing.band(ax, result.steps.tolist(), values[0], 1, "with random biases")
        drawing.band(ax, result.steps.tolist(), values[1], 0, "a kernel's last digit changed")
        ax.set(title=dtype, xlabel="training step", yscale="log")
        drawing.legend_below(ax)
    axes[0].set_ylabel("difference of test logits / largest")
    figure.suptitle("How far from a run without biases", fontsize=11)
    return figure
