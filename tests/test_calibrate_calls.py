"""Batches that call layers different numbers of times, and arguments that are not arrays."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from jaxbn.calibrate._batches import join, split
from tests.calibration import TOLERANCE, Norm, data
from tests.close import assert_close

NAMES = ("entry", "cell", "exit")


def unrolled(layers, x):
    """Apply `entry` to the first step of `x`, (N, T, C), `cell` to the others, `exit` if T > 2."""
    h = layers["entry"](x[:, 0])
    for t in range(1, x.shape[1]):
        h = layers["cell"](x[:, t] + 2 * h)
    return layers["exit"](h + h**2 / 4) if x.shape[1] > 2 else h


class Unrolled(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        return unrolled({k: Norm(use_running_average=not self.train, name=k) for k in NAMES}, x)


class UnrolledNNX(nnx.Module):
    def __init__(self, train):
        norm = partial(jaxbn.nnx.BatchNorm, **jaxbn.PYTORCH)
        self.layers = nnx.Dict(
            {k: norm(4, use_running_average=not train, rngs=nnx.Rngs(0)) for k in NAMES}
        )

    def __call__(self, x):
        return unrolled(self.layers, x)


def recalibrated(model, batches) -> Any:
    """Return the statistics by layer and name."""
    if isinstance(model, nnx.Module):
        statistics = recalibrate(model, nnx.state(model, nnx.BatchStat), batches)
        return nnx.to_pure_dict(statistics)["layers"]
    variables = model.clone(train=False).init(jax.random.key(0), np.ones((2, 3, 4), "float32"))
    return recalibrate(model, variables, batches)["batch_stats"]


def expected(batches):
    """Run `unrolled` on all batches in float64, each call normalized over all batches with it."""
    observed = {name: [] for name in NAMES}

    def norm(name, inputs):
        together = np.concatenate(inputs)
        observed[name].append(together)
        mean, var = together.mean(0), together.var(0)
        return [(x - mean) / np.sqrt(var + 1e-5) for x in inputs]

    batches = sorted((np.asarray(x, np.float64) for x in batches), key=lambda x: -x.shape[1])
    h = norm("entry", [x[:, 0] for x in batches])
    for t in range(1, batches[0].shape[1]):
        longer = [x[:, t] for x in batches if x.shape[1] > t]
        inputs = [x + 2 * h_x for x, h_x in zip(longer, h, strict=False)]
        h[: len(inputs)] = norm("cell", inputs)
    longest = [h_x for x, h_x in zip(batches, h, strict=True) if x.shape[1] > 2]
    if longest:
        norm("exit", [h_x + h_x**2 / 4 for h_x in longest])

    merged = {name: np.concatenate(calls) for name, calls in observed.items() if calls}
    return {name: {"mean": x.mean(0), "var": x.var(0, ddof=1)} for name, x in merged.items()}


def sequences(*lengths):
    rng = np.random.default_rng(0)
    # Batches of different sizes, means and deviations.
    return [
        (rng.normal(size=(5 + n, n, 4)) * n + i).astype("float32") for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    "model, train, lengths",
    [
        (Unrolled, True, (1, 2, 4)),
        (Unrolled, True, (4, 2, 1)),
        (Unrolled, False, (2, 4, 1, 4)),
        (UnrolledNNX, True, (1, 2, 4)),
        (UnrolledNNX, False, (4, 1)),
    ],
)
def test_every_call_of_every_batch_counts(model, train, lengths):
    """Entry, three cells and exit: the longest path has five layers, in the shortest batch one."""
    batches = sequences(*lengths)
    got, want = recalibrated(model(train), batches), expected(batches)
    tolerance = TOLERANCE["float32"]
    compare = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(compare, got, want)


def test_layers_that_no_batch_calls_keep_their_statistics():
    batches = sequences(1, 2)
    got = recalibrated(Unrolled(True), batches)
    np.testing.assert_array_equal(got["exit"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(got["exit"]["var"], np.ones(4))
    np.testing.assert_allclose(got["cell"]["mean"], expected(batches)["cell"]["mean"], 1e-5)


class FrozenFirst(nn.Module):
    """Batches without `more` call only the frozen layer, or none at all."""

    @nn.compact
    def __call__(self, x, more, frozen=True):
        if frozen:
            x = Norm(use_running_average=True)(x)
        return Norm(use_running_average=False, name="trained")(x) if more else x


def test_one_batch_in_training_mode_keeps_frozen_layers():
    x = data(shape=(10, 4))
    variables = FrozenFirst().init(jax.random.key(0), x, True)
    for batches in ([(x, False), (x, False, False), (x, True)], [(x, True), (x, False)]):
        got = recalibrate(FrozenFirst(), variables, batches)["batch_stats"]
        assert_close(got["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"], 0)
        np.testing.assert_allclose(got["trained"]["var"], x.var(0, ddof=1), rtol=5e-5)
    got = recalibrate(FrozenFirst(), variables, [(x, False, False), (x, False)])["batch_stats"]
    np.testing.assert_allclose(got["BatchNorm_0"]["mean"], x.mean(0), rtol=1e-6)


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x, train, times=1, mode="plain"):
        norm = Norm(use_running_average=not train if mode == "plain" else train)
        for _ in range(times):
            x = norm(2 * x)
        return x


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x, True, 2),
        lambda x: (x, np.bool_(True), 2),
        lambda x: {"x": x, "train": True, "times": 2},
        lambda x: (x, np.bool_(False), 2, "swapped"),
    ],
)
def test_arguments_that_are_not_arrays(form):
    x = data(shape=(10, 4))
    variables = Repeated().init(jax.random.key(0), x, False)
    want = recalibrate(Repeated(), variables, [x[:3], x[3:]], train=True, times=2)
    got = recalibrate(Repeated(), variables, [form(x[:3]), form(x[3:])])
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_batch_is_split_into_arrays_and_constants():
    x, key = np.ones(3), jax.random.key(0)
    batch = (x, {"train": True, "mask": None, "times": 1, "key": key}, 1.0)
    arrays, constants = split(batch)
    assert list(map(id, arrays)) == [id(x), id(key)]
    assert join(arrays, constants) == batch
    assert len({split((x, 1))[1], split((key, 1))[1]}) == 1
    # These are equal in Python, but a model may distinguish them.
    assert len({split((x, one))[1] for one in (1, True, 1.0, np.bool_(True))}) == 4


class Traced(nn.Module):
    on_trace: Callable[[], None]

    @nn.compact
    def __call__(self, x, train):
        self.on_trace()
        for _ in range(3):
            x = nn.tanh(Norm(use_running_average=not train)(x + x**2))
        return x


@pytest.mark.parametrize("train, traces", [(True, 2), (False, 3)])
def test_each_shape_is_compiled_once(train, traces):
    """Each shape is traced to find calls, in training mode and then in any, and then compiled."""
    x, count = data(shape=(10, 4)), Counter()
    model = Traced(partial(count.update, ["traced"]))
    variables = model.init(jax.random.key(0), x, False)
    count.clear()
    shapes = 2
    recalibrate(model, variables, [x[:4], x[4:8], x[8:]], train=train)
    assert count["traced"] == shapes * traces


def test_an_empty_batch_has_no_effect():
    x = data(shape=(10, 4))
    variables = Repeated().init(jax.random.key(0), x, False)
    run = partial(recalibrate, Repeated(), variables, train=True, times=2)
    want = run([x[:3], x[3:]])
    for batches in ([x[:0], x[:3], x[3:]], [x[:3], x[:0], x[3:]], [x[:3], x[3:], x[:0]]):
        jax.tree.map(np.testing.assert_array_equal, run(batches), want)


def test_a_model_that_was_compiled_before():
    """The compiled function of `nn.jit` has a cache, from which calls would not be observed."""
    x = data(shape=(10, 4))
    model = nn.jit(Repeated, static_argnums=(2, 3, 4))()
    variables = model.init(jax.random.key(0), x, False)
    for train in (True, False):
        run = partial(model.apply, variables, x, train, mutable=["batch_stats"])
        jax.eval_shape(lambda run=run: run())
        model.apply(variables, x, False)
        for _ in range(2):
            got = recalibrate(model, variables, [(x[:3], train), (x[3:], train)])
            want = recalibrate(Repeated(), variables, [x], train=train)
            assert_close(got, want, TOLERANCE["float32"])
