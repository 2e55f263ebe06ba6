"""Inputs on which float32 batch norms lose digits: ours keeps them, as extended precision shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import oracle

N, C = 4096, 16
NORMAL = np.random.default_rng(0).normal(size=(N, C))
ROW = np.arange(N)[:, None]

INPUTS = {
    "N(0, 1)": NORMAL,
    "N(2, 1)": NORMAL + 2,
    "N(0.95, 1)": NORMAL + 0.95,
    "N(1.5, 1)": NORMAL + 1.5,
    "N(1e3, 1)": NORMAL + 1e3,
    "N(1e4, 1)": NORMAL + 1e4,
    "N(-1e5, 1)": NORMAL - 1e5,
    "N(1e6, 1)": NORMAL + 1e6,
    "a mean per feature": NORMAL + 10.0 ** np.arange(-8, 8),
    "a deviation per feature": 100 + NORMAL * 10.0 ** np.arange(-8, 8),
    "spike": np.where(ROW == 7, 1e6, NORMAL),
    "first value a spike far from zero": np.where(ROW == 0, 1e8, NORMAL + 1e4),
    "two clusters": np.sign(NORMAL) * 1e4 + NORMAL,
    "two clusters far from zero": np.sign(NORMAL) * 1e3 + NORMAL + 1e6,
    "halves": np.where(ROW < N // 2, -1e5, 1e5) + NORMAL,
    "ramp": ROW + np.zeros(C),
    "ramp far from zero": ROW + 1e6 + np.zeros(C),
    "one value apart from a constant": np.where(ROW == 7, 2.0, 1.0) + np.zeros(C),
    "one value apart from a constant far from zero": 1e7 + (ROW == 7) + np.zeros(C),
    "0 and 1": (NORMAL > 1).astype(float),
    "tiny": NORMAL * 1e-20,
    "tiny, far from zero": (NORMAL + 1e4) * 1e-20,
    "huge": NORMAL * 1e17,
    "huge, far from zero": (NORMAL + 1e4) * 1e15,
}
CONSTANTS = [0.0, 3.3, -1e-3, 1e-25, 123456.7, 1e34]

# 8 roundings: y takes about four, and sums over the batch, which XLA adds up in a tree, a few.
TOLERANCE = 1e-6


def gradients(x, dy, scale, bias, mask=None):
    """y, dx, dscale and dbias of a training step."""

    @jax.jit
    def step(x, scale, bias, dy):
        def y(x, scale, bias):
            params = {"scale": scale, "bias": bias}
            return jaxbn.batch_norm(params, None, x, True, mask=mask)[0]

        out, vjp = jax.vjp(y, x, scale, bias)
        return out, *vjp(dy)

    return step(*map(jnp.asarray, (x, scale, bias, dy)))


def assert_accurate(x, dy, mask=None):
    rng = np.random.default_rng(1)
    scale, bias = (rng.uniform(0.5, 2, size=C).astype(np.float32) for _ in range(2))
    truth = oracle.batch_norm(x, dy, scale, bias, mask=mask)
    ours = gradients(x, dy, scale, bias, mask)
    for name, a, b in zip(["y", "dx", "dscale", "dbias"], ours, truth, strict=False):
        assert oracle.error(a, b) <= TOLERANCE, name


@pytest.mark.parametrize("name", INPUTS)
def test_hard_inputs(name):
    dy = np.random.default_rng(2).normal(size=(N, C)).astype(np.float32)
    assert_accurate(INPUTS[name].astype(np.float32), dy)


@pytest.mark.parametrize("mean", [0.0, 0.95, 1.5, 1.95, 1e3])
def test_features_first(mean):
    """Other reductions for the compiler, which adds up in another order."""
    rng = np.random.default_rng(7)
    x = (mean + rng.normal(size=(16, 8, 1000))).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)

    @jax.jit
    def step(x, dy):
        y, vjp = jax.vjp(lambda x: jaxbn.batch_norm({}, None, x, True, axis=1)[0], x)
        return y, vjp(dy)[0]

    truth = oracle.batch_norm(x, dy, axis=1)
    for a, b in zip(step(x, dy), truth, strict=False):
        assert oracle.error(a, b) <= TOLERANCE / 2


@pytest.mark.parametrize("name", ["N(0, 1)", "N(1e4, 1)", "two clusters far from zero"])
def test_hard_inputs_under_a_mask(name):
    rng = np.random.default_rng(3)
    mask = rng.random((N, C)) < 0.7
    dy = rng.normal(size=(N, C)).astype(np.float32)
    x = np.where(mask, INPUTS[name], np.nan).astype(np.float32)
    assert_accurate(x, dy, mask)


@pytest.mark.parametrize("value", CONSTANTS)
@pytest.mark.parametrize("rows", [2, 1000, 4096])
def test_a_constant_feature_is_exactly_zero_before_the_bias(value, rows):
    x = np.random.default_rng(4).normal(size=(rows, 3)).astype(np.float32)
    x[:, 1] = value
    scale, bias = np.array([2, 3, 4], np.float32), np.array([5, 6, 7], np.float32)
    dy = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    y, dx, dscale, _ = gradients(x, dy, scale, bias)
    np.testing.assert_array_equal(y[:, 1], 6)
    assert dscale[1] == 0
    truth = oracle.batch_norm(x, dy, scale, bias)
    assert oracle.error(dx[:, 1], truth.dx[:, 1]) <= TOLERANCE


@pytest.mark.parametrize("name", INPUTS)
def test_running_statistics(name):
    x = INPUTS[name].astype(np.float32)
    params, state = jaxbn.init(x.shape)
    _, state = jax.jit(lambda s, x: jaxbn.batch_norm(params, s, x, True, momentum=0.0))(state, x)
    truth = oracle.batch_norm(x, x)
    # Feature by feature: each mean to a rounding of its size, or of the deviation if that is more.
    size = np.maximum(np.abs(truth.mean), np.sqrt(truth.var))
    assert np.all(np.abs(np.asarray(state["mean"]) - truth.mean) <= 2e-7 * size)
    # Squares below 1e-38 are zero in float32.
    var = truth.var * N / (N - 1)
    assert np.all(np.abs(np.asarray(state["var"]) - var) <= TOLERANCE * var + 1e-37)


def test_many_values():
    """Sums of 2^22 numbers lose digits unless they are added up in a tree."""
    x = np.random.default_rng(6).normal(1.0, 1.0, size=(2**22, 2)).astype(np.float32)
    y = jax.jit(lambda x: jaxbn.batch_norm({}, None, x, True)[0])(x)
    exact = x.astype(np.longdouble)
    truth = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + np.longdouble(1e-5))
    assert oracle.error(y, truth) <= TOLERANCE


def test_a_count_that_float32_cannot_reach_by_ones():
    x = jnp.tile(jnp.array([[1.0], [3.0]]), (2**24, 1))
    mask = jnp.ones((len(x), 1), bool)
    state = {"mean": jnp.zeros(1), "var": jnp.zeros(1)}
    step = jax.jit(lambda x: jaxbn.batch_norm({}, state, x, True, momentum=0.0, mask=mask)[1])
    np.testing.assert_allclose(step(x)["mean"], 2, rtol=TOLERANCE)
    np.testing.assert_allclose(step(x)["var"], 1, rtol=TOLERANCE)


def test_a_naive_variance_would_be_caught():
    x = INPUTS["N(1e4, 1)"].astype(np.float32)

    @jax.jit
    def naive(x):
        var = jnp.mean(x * x, 0) - jnp.mean(x, 0) ** 2
        return (x - jnp.mean(x, 0)) / jnp.sqrt(jnp.abs(var) + 1e-5)

    assert oracle.error(naive(x), oracle.batch_norm(x, x).y) > 100 * TOLERANCE
