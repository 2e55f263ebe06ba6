"""Sums about zero are good enough for inputs in half precision, whose own rounding is worse.

Let a feature have deviation 1 and a mean r. Float32 has the unit roundoff
u = 2^-24. The square of a number in half precision has at most 22 bits, so float32 holds it
exactly and only additions round. In a tree of log2(n) levels each addition rounds by up to u of a
sum that is near r² times its number of terms. At random, the roundings of a path add up to
sqrt(log2(n) / 3) u. The variance is the difference of E[d²] and E[d]², and the error of the mean
counts twice in the latter. With n = 4096 this gives (2 + 2 · 2) u r². With some allowance for the
largest of several features, the variance is wrong by c r² 2^-24, where c = 8, and y by half of it.

The rounding of the input itself moves each value by up to r 2^-8 (bfloat16, 8 bits) or r 2^-11
(float16, 11 bits). That is more than c r² 2^-25 for every r below 2^14 and 2^11: in bfloat16, for
every r at which values can still differ (2^8), and in float16 for all but the last of them.
"""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import forms, oracle

N, C = 4096, 8
CONSTANT = 8
# The bits that a number of each type has, so values at 2^bits deviations still differ.
BITS = {"bfloat16": 8, "float16": 11}

every_form = pytest.mark.parametrize("form", forms.FORMS)
each_dtype = pytest.mark.parametrize("dtype", BITS)


@cache
def step_in(form, with_state=True):
    def step(x, running_mean):
        state = {"mean": running_mean, "var": jnp.ones(C)} if with_state else None
        options = {"momentum": 0.0, "running_variance": "biased", "dtype": jnp.float32}
        y, new = jaxbn.batch_norm({}, state, x, True, **options)
        return y, new

    return forms.jit(step, form)


def rounded(distance, dtype):
    """Return an input in float64, in half precision, and that rounded input in float64."""
    x = distance + np.random.default_rng(distance).normal(size=(N, C))
    half = jnp.asarray(x, dtype)
    return x, half, np.asarray(half.astype(jnp.float32)).astype(float)


def distances(dtype):
    return [2**e for e in range(BITS[dtype])]


@every_form
@each_dtype
@pytest.mark.parametrize("state", ["fresh", "warmed", "none"])
def test_y_is_as_good_as_from_exact_statistics_of_the_rounded_input(dtype, form, state):
    for distance in distances(dtype):
        x, half, exact = rounded(distance, dtype)
        truth = oracle.batch_norm(x, x).y
        best = np.max(np.abs(oracle.batch_norm(exact, exact).y - truth))
        mean = np.full(C, distance + 0.3 if state == "warmed" else 0, np.float32)
        y, _ = step_in(form, state != "none")(half, mean)
        error = np.max(np.abs(y - truth))
        assert error <= best + np.max(np.abs(truth)) * CONSTANT * distance**2 * 2**-25, distance
        assert error <= 2 * best, distance


@every_form
@each_dtype
def test_the_variance_is_within_its_bound(dtype, form):
    for distance in [*distances(dtype), 2 ** BITS[dtype]]:
        _, half, exact = rounded(distance, dtype)
        truth = oracle.batch_norm(exact, exact).var
        _, new = step_in(form)(half, np.zeros(C, np.float32))
        error = np.max(np.abs(new["var"] - truth))
        assert error <= CONSTANT * (distance**2 + 1) * 2**-24, distance


@pytest.mark.parametrize("state", [True, False])
def test_on_a_cpu_the_variance_is_as_accurate_as_in_float32(state):
    _, half, exact = rounded(2**8, "float16")
    truth = oracle.batch_norm(exact, exact)
    y, new = step_in("cpu", state)(half, np.full(C, 2**8, np.float32))
    assert oracle.error(y, truth.y) <= 1e-6
    if state:
        assert oracle.error(new["var"], truth.var) <= 1e-6


@every_form
@each_dtype
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_running_mean_that_is_not_finite_does_not_reach_y(dtype, form, value):
    _, half, _ = rounded(4, dtype)
    fresh = np.zeros(C, np.float32)
    y, _ = step_in(form)(half, np.where(np.arange(C) == 2, value, fresh))
    np.testing.assert_array_equal(y, step_in(form)(half, fresh)[0])


@every_form
@each_dtype
@pytest.mark.parametrize("state", ["fresh", "warming", "warmed", "none"])
@pytest.mark.parametrize("shape", [(1,), (7,), (1000,), (4, 33, 17)])
def test_constant_features_are_exact(dtype, form, state, shape):
    """The spacing of half-precision numbers is large relative to rounding errors of sums."""
    values = [0.0, 1 / 3, -3.3, 1e-3, 1000.0, 60000.0, 0.999]
    values.append(-1e-7 if dtype == "float16" else 1e34)
    x = jnp.broadcast_to(jnp.asarray(values, dtype), (*shape, C))
    share = {"fresh": 0, "warming": 0.271, "warmed": 1 - 1e-6, "none": 0}[state]
    running_mean = np.asarray(values, np.float32) * np.float32(share)
    y, new = step_in(form, state != "none")(x, running_mean)
    np.testing.assert_array_equal(y, 0)
    if new is not None:
        np.testing.assert_array_equal(new["mean"], x.reshape(-1, C)[0].astype(jnp.float32))
        # In float16 the rounding errors of sums about zero remain, see test_moments.py.
        rounding = 2.0**-19 if dtype == "float16" and form != "cpu" else 0
        assert np.all(new["var"] <= rounding * np.square(new["mean"].astype(float)))


@every_form
@pytest.mark.parametrize("running_mean", [300.0, 1e4, 1e20])
def test_a_running_mean_far_from_the_data_does_not_matter(form, running_mean):
    """The statistics may be of other data, or of another scale."""
    _, half, exact = rounded(1, "bfloat16")
    truth = oracle.batch_norm(exact, exact)
    y, new = step_in(form)(half, np.full(C, running_mean, np.float32))
    assert oracle.error(new["mean"], truth.mean) <= 1e-6
    assert oracle.error(new["var"], truth.var) <= 1e-6
    assert oracle.error(y, truth.y) <= 1e-6


@every_form
@pytest.mark.parametrize("values", [[996, 1000, 1004], [0.9921875, 1, 1.0078125]])
def test_neighbours_whose_mean_is_one_of_them_are_not_constant(values, form):
    x = np.repeat(np.asarray(values), [100, 800, 100])[:, None] + np.zeros(C)
    truth = oracle.batch_norm(x, x)
    y, new = step_in(form)(jnp.asarray(x, jnp.bfloat16), np.zeros(C, np.float32))
    # The bound above, for r = 1000 / 1.8 or 1 / 0.0035.
    assert np.all(np.abs(new["var"] - truth.var) <= CONSTANT * truth.mean**2 * 2.0**-24)
    assert np.max(np.abs(y - truth.y)) <= 0.2 * np.max(np.abs(truth.y))
