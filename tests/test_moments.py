"""`jaxbn._moments.moments` is accurate in the form of every platform."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn import _separate_readings
from jaxbn._moments import Moments, moments, statistics_dtype
from jaxbn._shift import FRACTION
from tests import forms, oracle

every_form = pytest.mark.parametrize("form", forms.FORMS)
LONG = np.longdouble


def of_batch(x, mask=None, shift=None, dtype=None):
    """Return the moments over every axis but the last."""
    x = jnp.asarray(x, dtype)
    wide = x.astype(statistics_dtype(x.dtype))
    return moments(wide, mask, shift, x.dtype, tuple(range(x.ndim - 1)))


@cache
def run_in(form):
    return forms.jit(of_batch, form)


def exact(x, mask=None):
    """Return the count, mean and variance of each feature, in extended precision."""
    truth = oracle.batch_norm(x, np.zeros_like(x), mask=mask)
    return truth.mean, truth.var


def mean_of(batch: Moments):
    """Return the sum of the two floats of the mean, in extended precision."""
    return (np.asarray(batch.mean_high).astype(LONG) + np.asarray(batch.mean_low)).ravel()


def one_in(fraction, layout, value, seed):
    """Return a batch from N(0, 1) whose sampled part is moved by `value`."""
    x = np.random.default_rng(seed).normal(size=(4096, 4))
    if layout == "rows":
        x[::fraction] += value
        return x.astype(np.float32)
    x = x.reshape(16, 16, 16, 4)
    x[:, (16 - 1) // 2] += value
    return x.astype(np.float32)


@every_form
@pytest.mark.parametrize("layout", ["rows", "images"])
@pytest.mark.parametrize("value", [3.0, 10.0, -1e4, 1e6])
@pytest.mark.parametrize("far", [0.0, -1e6])
def test_the_bound_on_the_error_of_the_variance(value, far, layout, form):
    """It is at most `FRACTION` times the error of a sum, of four roundings, 2^-22."""
    x = one_in(FRACTION, layout, value, 0) + np.float32(far)
    _, var = exact(x)
    error = np.max(np.abs(run_in(form)(x).var.ravel() - var) / var)
    assert error <= FRACTION * 2**-22
    if form == "cpu":
        # It reads the batch twice, and any sampled part is like any other.
        assert error <= 1e-6


@every_form
@pytest.mark.parametrize("rows", [292, 1000])
def test_the_two_floats_of_the_mean_agree(rows, form):
    """One of them must not be rounded as in one place of the program, one as in another.

    The values are multiples of 2^-14, and means lie halfway between two numbers of float32.
    """
    rng = np.random.default_rng(1)
    half = rng.integers(-2000, 2000, size=(rows // 2, 512))
    # Pairs that add up to an odd number of units.
    x = 1000 + np.concatenate([half, 1 - half]) * 2.0**-14
    batch = run_in(form)(x.astype(np.float32))
    truth, var = exact(x)
    assert np.max(np.abs(mean_of(batch) - truth) / np.sqrt(var)) <= 1e-6


@every_form
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(1,), (7,), (1000,), (3, 5, 7), (4, 33, 17)])
def test_constant_features_are_exact(shape, dtype, form):
    values = [0.0, 1 / 3, -3.3, 1e-3, 1000.0, 60000.0, *([] if dtype == "float16" else [1e34])]
    x = jnp.broadcast_to(jnp.asarray(values, dtype), (*shape, len(values)))
    batch = run_in(form)(x)
    np.testing.assert_array_equal(batch.mean_high.ravel(), x.reshape(-1, len(values))[0])
    np.testing.assert_array_equal(batch.mean_low, 0)
    # In float16, the sums about zero of other platforms leave their rounding errors: 2^-24 of the
    # mean's square for each of up to a few dozen values that are added one by one.
    rounding = 2.0**-19 if dtype == "float16" and form != "cpu" else 0
    assert np.all(batch.var <= rounding * np.square(batch.mean_high.astype(float)))


@every_form
def test_float64(x64, form):
    x = 1e7 + np.random.default_rng(0).normal(size=(1000, 3))
    batch = forms.jit(of_batch, form)(x)
    truth, var = exact(x)
    assert batch.var.dtype == jnp.float64
    assert oracle.error(batch.var.ravel(), var) <= 1e-13
    assert np.max(np.abs(mean_of(batch) - truth)) <= 1e-15


@every_form
@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_no_value(shape, form):
    batch = run_in(form)(np.zeros(shape, np.float32))
    for leaf in batch:
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@every_form
@pytest.mark.parametrize("value", [5.5, -1e30])
def test_one_value(value, form):
    batch = run_in(form)(np.full((1, 2), value, np.float32))
    np.testing.assert_array_equal(batch.n, 1)
    np.testing.assert_array_equal(batch.mean.ravel(), np.float32(value))
    np.testing.assert_array_equal(batch.var, 0)


@every_form
@pytest.mark.parametrize("shape", [(40, 1), (40, 3)])
def test_a_mask(shape, form):
    """Masked-out NaN and infinity do not count, and a feature may have no value at all."""
    rng = np.random.default_rng(2)
    x = (100 + rng.normal(size=(40, 3))).astype(np.float32)
    mask = rng.random(shape) < 0.5
    mask[:, -1] &= shape[1] == 1
    x = np.where(mask, x, np.where(rng.random(x.shape) < 0.5, np.nan, np.inf)).astype(np.float32)
    batch = run_in(form)(x, mask)
    truth, var = exact(x, mask)
    np.testing.assert_array_equal(batch.n, mask.sum(0, keepdims=True))
    assert oracle.error(batch.mean.ravel(), truth) <= 1e-6
    assert oracle.error(batch.var.ravel(), var) <= 1e-6
    if shape[1] == 3:
        assert batch.mean[0, 2] == batch.var[0, 2] == 0


def test_the_mean_is_the_sum_of_its_two_floats():
    one = jnp.ones(1)
    assert Moments(one, 2 * one, 0.25 * one, one).mean == 2.25


@every_form
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(x64, form, masked):
    """Tangents are E[dx] and 2 E[(x - mean) dx]; the count and `mean_high` have none."""
    rng = np.random.default_rng(3)
    x, dx = rng.normal(2.0, 1.0, size=(2, 32, 3))
    mask = rng.random((32, 3)) < 0.7 if masked else np.ones((32, 3), bool)

    def jvp(x, dx, mask):
        return jax.jvp(lambda x: of_batch(x, mask if masked else None), (x,), (dx,))

    batch, tangent = forms.jit(jvp, form)(x, dx, mask)
    n = mask.sum(0)
    np.testing.assert_array_equal(tangent.n, np.zeros_like(tangent.n))
    np.testing.assert_array_equal(tangent.mean_high, np.zeros_like(tangent.mean_high))
    np.testing.assert_allclose(tangent.mean_low.ravel(), (mask * dx).sum(0) / n, rtol=1e-12)
    dvar = 2 * (mask * (x - np.asarray(batch.mean)) * dx).sum(0) / n
    np.testing.assert_allclose(tangent.var.ravel(), dvar, rtol=1e-12)
    # Central differences, whose error is of the order of the squared step.
    with forms.of(form):
        ends = [of_batch(x + h * dx, mask if masked else None) for h in (1e-6, -1e-6)]
    numeric = (ends[0].var - ends[1].var) / 2e-6
    np.testing.assert_allclose(numeric, tangent.var, rtol=1e-7, atol=1e-7)


@every_form
def test_groups_of_examples(form):
    """Groups of ghost batches have their own axis, which is kept."""
    x = (10 + np.random.default_rng(4).normal(size=(4, 32, 5, 3))).astype(np.float32)
    batch = forms.jit(lambda x: moments(x, None, None, x.dtype, (1, 2)), form)(x)
    for group, mean_, var in zip(x, batch.mean, batch.var, strict=True):
        truth = exact(group)
        assert oracle.error(mean_.ravel(), truth[0]) <= 1e-6
        assert oracle.error(var.ravel(), truth[1]) <= 1e-6


@every_form
def test_vmap(form):
    """Of the mapped batches, some need more passes on a CPU than others."""
    x = np.random.default_rng(5).normal(size=(3, 64, 4)) + np.array([0, 1e2, 1e5])[:, None, None]
    x = x.astype(np.float32)
    batches = forms.jit(jax.vmap(of_batch), form)(x)
    for i, own in enumerate(x):
        truth, var = exact(own)
        assert oracle.error(batches.mean[i].ravel(), truth) <= 1e-6
        assert np.max(np.abs(batches.var[i].ravel() - var) / var) <= 1e-6


@pytest.mark.parametrize(
    ("mean", "deviation", "running_mean", "again"),
    [
        (0, 1, 0, 0),
        (0.9, 1, 0, 0),
        (3.9, 1, 3.5, 0),
        (0, 0, 0, 0),
        (1.1, 1, 0, 1),
        (3.9, 1, 2.8, 1),
        (4.5, 1, 4.5, 1),
        (1e5, 1, 0, 1),
        (1e5, 1, np.nan, 1),
        (3.3, 0, 0, 2),
    ],
)
@pytest.mark.parametrize("shape", [(1000,), (10, 10, 10)])
def test_a_cpu_reads_again_only_what_is_inaccurate(
    mean, deviation, running_mean, again, shape, monkeypatch
):
    """The shift must be near the mean and near zero, and exact for equal values."""
    normal = np.random.default_rng(0).normal(size=(1000, 1))
    x = mean + deviation * (normal - normal.mean()) / normal.std()
    x = jnp.asarray(x.reshape(*shape, 1), jnp.float32)
    shifts = []
    about = _separate_readings.moments_about

    def noted(shift, **keywords):
        jax.debug.callback(lambda s: shifts.append(float(s.ravel()[0])), shift)
        return about(shift, **keywords)

    with forms.of("cpu"):
        monkeypatch.setattr(_separate_readings, "moments_about", noted)
        shift = jnp.full((1,) * x.ndim, running_mean, jnp.float32)
        batch = jax.jit(lambda x: of_batch(x, shift=shift))(x)
        jax.effects_barrier()
        monkeypatch.undo()
    assert len(shifts) == again
    exact = np.asarray(x).astype(float)
    np.testing.assert_allclose(
        mean_of(batch), exact.mean(), rtol=0, atol=1e-6 * max(deviation, 1e-30)
    )
    np.testing.assert_allclose(batch.var.ravel(), exact.var(), rtol=1e-6, atol=1e-30)
