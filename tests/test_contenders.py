"""The benchmarks' layers all do the same job, on the data that the tables name."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contenders, speed, training_step
from benchmarks.contenders import Arrays, Problem
from benchmarks.resnet import NORMS, ResNet
from benchmarks.resnet import training_step as step
from tests import oracle

# Some of the other libraries promote dtypes.
pytestmark = pytest.mark.usefixtures("standard_promotion")

MAKERS, MISSING = contenders.available()
PROBLEMS = [
    Problem((8, 3, 5, 4), -1, "float32"),
    Problem((8, 4, 3, 5), 1, "float32"),
    Problem((32, 4), -1, "float32"),
    Problem((8, 3, 5, 4), -1, "bfloat16"),
]
# A few roundings of the type; in bfloat16 Haiku and Equinox round the moments too.
TOLERANCE = {"float32": 2e-6, "bfloat16": 4 * 2.0**-8}


def assert_same_job(
    contender, batch, arrays: Arrays, problem: Problem, ddof: int = 0, momentum=contenders.MOMENTUM
) -> None:
    x, dy, scale, bias, mean, var = (np.asarray(v, np.float32) for v in arrays)
    truth = oracle.batch_norm(x, dy, scale, bias, axis=problem.axis)
    n = x.size // len(scale)
    running = truth._replace(
        mean=momentum * mean + (1 - momentum) * truth.mean,
        var=momentum * var + (1 - momentum) * truth.var * n / (n - ddof),
    )
    for name, value, expected in zip(
        oracle.Result._fields, contender.numbers(batch), running, strict=True
    ):
        value = np.asarray(value, np.float32)
        assert oracle.error(value, expected) <= TOLERANCE[problem.dtype], name


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_contenders_do_the_same_job(name, problem):
    contender, arrays = MAKERS[name](problem), speed.arrays(problem)
    # Statistics unlike the batch's, so that a layer that ignores or keeps them fails.
    arrays = arrays._replace(mean=arrays.mean + 0.5, var=2 * arrays.var)
    batch = contender.put(arrays)
    x, _, scale, bias, mean, var = (np.asarray(v, np.float32) for v in arrays)

    def features(leaf: np.ndarray) -> np.ndarray:
        return leaf.reshape([-1 if a == problem.axis % x.ndim else 1 for a in range(x.ndim)])

    def numpy(y) -> np.ndarray:
        if name == "PyTorch":
            # Features are on axis 1, whichever axis is last in memory.
            y = y.float() if problem.axis == 1 else y.float().movedim(1, -1)
        return np.asarray(y, np.float32)

    # Evaluation first: PyTorch moves its statistics in place.
    y = contender.evaluate(batch)
    assert str(y.dtype).removeprefix("torch.") == problem.dtype
    x_hat = (x - features(mean)) / np.sqrt(features(var) + contenders.EPSILON)
    expected = features(scale) * x_hat + features(bias)
    assert oracle.error(numpy(y), expected) <= TOLERANCE[problem.dtype]

    exception: dict = {}
    if name == "PyTorch":
        exception = {"ddof": 1}
    elif name == "Haiku":
        # It rounds its decay rate to the input's type, and in bfloat16 0.01 becomes 0.0117.
        exception = {"momentum": float(jnp.asarray(contenders.MOMENTUM, problem.dtype))}
    assert_same_job(contender, batch, arrays, problem, **exception)
    y = contender.forward(batch)
    y = y if name == "PyTorch" else y[0]
    assert str(y.dtype).removeprefix("torch.") == problem.dtype
    expected = oracle.batch_norm(x, x, scale, bias, axis=problem.axis).y
    assert oracle.error(numpy(y), expected) <= TOLERANCE[problem.dtype]


def test_another_job_would_be_noticed():
    problem = PROBLEMS[0]
    contender, arrays = MAKERS["ours"](problem), speed.arrays(problem)
    batch = contender.put(arrays)
    with pytest.raises(AssertionError, match="var"):
        assert_same_job(contender, batch, arrays, problem, ddof=1)
    with pytest.raises(AssertionError, match="y"):
        shifted = arrays._replace(bias=arrays.bias + 1e-4)
        assert_same_job(contender, batch, shifted, problem)


def test_pytorch_has_the_memory_layout_of_the_others():
    for problem, last in [(PROBLEMS[0], True), (PROBLEMS[1], False)]:
        x = MAKERS["PyTorch"](problem).put(speed.arrays(problem)).x
        assert x.shape == (8, 4, 3, 5)
        assert (x.stride(1) == 1) == last


def test_every_contender_is_here_or_its_absence_explained(monkeypatch):
    names = ["ours", "Flax", "Flax stable", "Haiku", "Equinox", "PyTorch"]
    assert [*MAKERS, *MISSING] == names
    monkeypatch.setattr(
        contenders, "JAX_LAYERS", {**contenders.JAX_LAYERS, "Haiku": ("no_such", contenders.haiku)}
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    found, missing = contenders.available()
    assert list(found) == ["ours", "Flax", "Flax stable", "Equinox"]
    assert missing["Haiku"] == "No module named 'no_such'"
    assert missing["PyTorch"].startswith("JAX runs on tpu")


@pytest.mark.parametrize("problem", [PROBLEMS[1], PROBLEMS[3]], ids=str)
def test_data_are_what_their_names_say(problem):
    # Of 2,048 values each mean lies within 5 / sqrt(2048) of what it is drawn for, and rounding to
    # bfloat16 moves it by less.
    problem = problem._replace(shape=(128, 4, 4, 4))
    found = {name: speed.arrays(problem, name) for name in speed.DATA}
    for name, arrays in found.items():
        x = np.asarray(arrays.x, np.float64)
        axes = tuple(a for a in range(4) if a != problem.axis % 4)
        assert arrays.x.dtype == problem.dtype
        np.testing.assert_allclose(x.std(axes), 1, atol=0.11)
        wanted = (np.zeros(4), np.ones(4)) if name == "fresh" else (x.mean(axes), x.var(axes))
        # The mean and variance of float32 sums: some roundings of values up to 10 and 100.
        np.testing.assert_allclose(arrays.mean, wanted[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(arrays.var, wanted[1], rtol=1e-5)
    np.testing.assert_allclose(found["standard"].mean, 0, atol=0.11)
    np.testing.assert_allclose(found["far"].mean, 5, atol=0.11)
    assert 0.3 < np.std(found["settled"].mean) < 3
    np.testing.assert_array_equal(found["fresh"].x, found["settled"].x)


def test_the_names_of_data():
    assert speed.data_names("far,settled,far") == ("far", "settled")
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        speed.data_names("settled,near")
    assert str(caught.value) == "near: the data are settled, standard, far, fresh"


def test_the_images_are_photographs():
    images = np.asarray(training_step.photographs((6, 16, 16, 3), seed=0))
    assert images.shape == (6, 16, 16, 3)
    pixels = (images * training_step.DEVIATION + training_step.MEAN) * 255
    # Whole numbers from 0 to 255, but for rounding to float32.
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-3)
    assert pixels.min() > -0.5 and pixels.max() < 255.5
    assert len(np.unique(images.reshape(6, -1), axis=0)) == 6
    # Neighbours are alike, as they are not in noise.
    assert np.abs(np.diff(images, axis=1)).mean() < 0.75 * np.abs(images - images.mean()).mean()


def test_warmed_up_statistics_are_those_of_the_batches():
    net = ResNet(NORMS["ours"], **(model := training_step.setup(True, on_cpu=True)[0]))
    batch = training_step.photographs((4, 16, 16, 3), seed=0)
    variables = jax.jit(net.init, static_argnums=2)(jax.random.key(0), batch, True)
    warm = training_step.warmed_up(variables, [batch] * 8, "float32", **model)
    jax.tree.map(np.testing.assert_array_equal, warm["params"], variables["params"])
    still, _ = jax.jit(step(net))(warm, batch, jnp.zeros(4, int))
    before, after = (jax.tree.leaves(v["batch_stats"]) for v in (warm, still))
    fresh = jax.tree.leaves(variables["batch_stats"])
    # Eight steps that halve the distance leave 2^-8 of it, and a step of Flax's moves by 1 % of it.
    for first, second, start in zip(before, after, fresh, strict=True):
        atol = 0.011 * 2.0**-8 * np.abs(start - first).max() + 1e-6 * np.abs(first).max()
        np.testing.assert_allclose(first, second, rtol=0, atol=atol)
    stats = {"a": {"mean": jnp.array([0.5, -3]), "var": jnp.array([1, 4])}}
    assert training_step.off_zero({**stats, "b": {"c": {"mean": 1.0, "var": 4.0}}}) == [True, False]
