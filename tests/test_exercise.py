"""The ten checks of the exercise that this project grew from, with the `EXERCISE` preset.

In float64 at the tolerances that the exercise uses (`torch.allclose`'s defaults); in float32 with a
tolerance that is derived.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

import jaxbn

RTOL, ATOL = 1e-5, 1e-8  # torch.allclose
EPSILON = jaxbn.EXERCISE["epsilon"]
SHAPES = [(64, 128), (64, 16, 32, 32)]

pytestmark = pytest.mark.usefixtures("x64")


def others(shape):
    return tuple(a for a in range(len(shape)) if a != 1)


def batch(shape, seed=0, dtype: DTypeLike = np.float64):
    x = np.random.default_rng(seed).normal(2.0, 3.0, size=shape)
    return jnp.asarray(x, dtype)


def layer(shape):
    return jaxbn.init(shape, axis=1, keepdims=True, param_dtype=jnp.float64)


def batch_norm(params, state, x, train):
    return jaxbn.batch_norm(params, state, x, train, axis=1, **jaxbn.EXERCISE)


def allclose(value, truth):
    return np.allclose(value, truth, rtol=RTOL, atol=ATOL)


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


def test_parameters_are_learnable(shape):
    params, state = layer(shape)
    x = batch(shape)
    grads = jax.grad(lambda p: jnp.sum(batch_norm(p, state, x, True)[0] ** 3))(params)
    assert set(grads) == {"scale", "bias"}
    for leaf in grads.values():
        assert np.all(np.isfinite(leaf)) and np.all(leaf != 0)


def test_parameter_shapes(shape):
    params, _ = layer(shape)
    wanted = {2: (1, 128), 4: (1, 16, 1, 1)}[len(shape)]
    assert params["scale"].shape == params["bias"].shape == wanted


def test_moving_average_shapes(shape):
    params, state = layer(shape)
    wanted = {2: (1, 128), 4: (1, 16, 1, 1)}[len(shape)]
    assert state["mean"].shape == state["var"].shape == wanted
    _, state = batch_norm(params, state, batch(shape), True)
    assert state["mean"].shape == state["var"].shape == wanted


def test_test_time_normalization(shape):
    params, state = layer(shape)
    x = batch(shape)
    state = {"mean": state["mean"] + 0.7, "var": state["var"] * 2.5}
    y, _ = batch_norm(params, state, x, False)
    assert allclose(y, (np.asarray(x) - 0.7) / np.sqrt(2.5 + EPSILON))


def test_mean(shape):
    params, state = layer(shape)
    y, _ = batch_norm(params, state, batch(shape), True)
    assert allclose(np.mean(y, others(shape)), 0)


def test_variance(shape):
    params, state = layer(shape)
    x = batch(shape)
    y, _ = batch_norm(params, state, x, True)
    # The exercise asks for one; epsilon makes it var / (var + epsilon).
    var = np.var(x, others(shape), ddof=1)
    assert allclose(np.var(y, others(shape), ddof=1), var / (var + EPSILON))
    assert allclose(np.var(y, others(shape), ddof=1), 1)


def test_training_time_normalization(shape):
    params, state = layer(shape)
    x = np.asarray(batch(shape))
    y, _ = batch_norm(params, state, jnp.asarray(x), True)
    mean = x.mean(others(shape), keepdims=True)
    var = x.var(others(shape), ddof=1, keepdims=True)
    assert allclose(y, (x - mean) / np.sqrt(var + EPSILON))


def moved(shape):
    """Return the states after each of three batches, and those of the exercise's formula."""
    params, state = layer(shape)
    mean, var = (np.asarray(state[k]) for k in ("mean", "var"))
    for seed in range(3):
        x = batch(shape, seed)
        _, state = batch_norm(params, state, x, True)
        mean = 0.9 * mean + 0.1 * np.mean(x, others(shape), keepdims=True)
        var = 0.9 * var + 0.1 * np.var(x, others(shape), ddof=1, keepdims=True)
    return state, mean, var


def test_moving_average_of_the_mean(shape):
    state, mean, _ = moved(shape)
    assert allclose(state["mean"], mean)


def test_moving_average_of_the_variance(shape):
    state, _, var = moved(shape)
    assert allclose(state["var"], var)


def test_scale_and_shift(shape):
    params, state = layer(shape)
    rng = np.random.default_rng(9)
    x = batch(shape)
    plain, _ = batch_norm(params, state, x, True)
    scale, bias = (rng.normal(size=params["scale"].shape) for _ in range(2))
    y, _ = batch_norm({"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, state, x, True)
    assert allclose(y, scale * np.asarray(plain) + bias)


def test_training_time_normalization_in_float32(shape):
    params, state = layer(shape)
    x = batch(shape, dtype=np.float32)
    exact = np.asarray(x, np.longdouble)
    mean = exact.mean(others(shape), keepdims=True)
    std = np.sqrt(exact.var(others(shape), ddof=1, keepdims=True) + np.longdouble(EPSILON))
    y, _ = batch_norm(params, state, x, True)
    # x, of up to 5 deviations and a mean of 2/3 of one, is shifted, multiplied and added to: three
    # roundings of numbers up to |x| / std, of at most eps / 2 each; mean and std have one more.
    eps = np.finfo(np.float32).eps
    bound = 2.5 * eps * np.abs(exact / std).max()
    assert np.abs(np.asarray(y).astype(np.longdouble) - (exact - mean) / std).max() <= bound
