"""Results on inputs that are hard in float32, compared with extended precision.

Each form of the computation that `jaxbn._fusion` has for a platform runs on the CPU here.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn._shift import FRACTION
from jaxbn.parity._hard_inputs import CONSTANTS, INPUTS, NORMAL, C, N
from tests import forms, oracle
from tests.accuracy import (
    BIAS,
    DY,
    LAYOUTS,
    LEAST_VARIANCE,
    SCALE,
    TOLERANCE,
    assert_accurate,
    run,
    step,
    step_in,
)
from tests.hard_inputs import ARRANGEMENTS, SAMPLED, arranged, extremes_sampled

every_form = pytest.mark.parametrize("form", forms.FORMS)


# Extended precision is slow, so one truth serves all forms and layouts.
@pytest.mark.parametrize("name", INPUTS)
def test_hard_inputs(name):
    for arrangement in ARRANGEMENTS:
        x = arranged(name, arrangement)
        truth = oracle.batch_norm(x, DY, SCALE, BIAS)
        for form, layout in itertools.product(forms.FORMS, LAYOUTS):
            assert_accurate(run(form, layout, x), truth, form, layout, arrangement)


# Shapes of 16 N values with an axis of size one. If a sum leaves that axis, XLA for CPUs may
# accumulate sequentially, and the rounding errors of this many values exceed the tolerance.
ONES = {
    "one feature": ((16 * N, 1), {}),
    "images of one pixel": ((16 * N, 1, 1, C), {}),
    "features on two axes": ((16 * N, 1, C), {"axis": (1, 2)}),
    "one channel of features": ((1, 16 * N, C), {"axis": (0, 2)}),
    "one ghost batch": ((16 * N, C), {"virtual_batch_size": 16 * N}),
}


@every_form
@pytest.mark.parametrize("name", ONES)
def test_axes_of_size_one(name, form):
    shape, options = ONES[name]
    features = shape[-1]
    x, dy = (
        np.tile(v[:, :features], (16, 1)).astype(np.float32) for v in (INPUTS["N(1e4, 1)"], DY + 3)
    )
    scale, bias = SCALE[:features], BIAS[:features]
    truth = oracle.batch_norm(x, dy, scale, bias)
    kept = (1, C) if "axis" in options else (features,)
    training = partial(step, scale=scale.reshape(kept), bias=bias.reshape(kept), **options)
    y, dx, *others = forms.jit(training, form)(x.reshape(shape), dy.reshape(shape))
    others = (v.reshape(features) for v in others)
    assert_accurate(oracle.Result(y.reshape(x.shape), dx.reshape(x.shape), *others), truth, form)


@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_deviations_beyond_the_promise(layout, form):
    """The squares of these deviations, and products of gradients, still fit into float32."""
    x = (NORMAL * 1e17).astype(np.float32)
    assert_accurate(run(form, layout, x), oracle.batch_norm(x, DY, SCALE, BIAS), form)


@pytest.mark.parametrize("name", INPUTS)
def test_hard_inputs_under_a_mask(name):
    """One mask differs by value and hides NaN, another hides all values that are sampled."""
    by_value = np.random.default_rng(3).random((N, C)) < 0.7
    hidden = ~(SAMPLED["rows"] | SAMPLED["images"])[:, None]
    for mask, layouts in [(by_value, ["rows"]), (hidden, LAYOUTS)]:
        x = np.where(mask, arranged(name, "permuted"), np.nan).astype(np.float32)
        truth = oracle.batch_norm(x, DY, SCALE, BIAS, mask=mask)
        for form, layout in itertools.product(forms.FORMS, layouts):
            assert_accurate(run(form, layout, x, mask), truth, form, layout)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("layout", ["rows", "NHWC"])
def test_the_worst_sample(name, layout):
    """The values sampled for the shift are the largest, or the smallest.

    The error of the variance is at most 16 times that of a sum, about four roundings, and that of
    `y` is half the variance's; what is allowed of either elsewhere is added. The mean is about as
    far from the shift as it has deviations, at most 4.
    """
    var_tolerance = FRACTION * 4 * 2**-24 + TOLERANCE / 2
    for sign in (1, -1):
        sampled = "rows" if layout == "rows" else "images"
        x = extremes_sampled(INPUTS[name].astype(np.float32), sampled, sign)
        truth = oracle.batch_norm(x, DY, SCALE, BIAS)
        for form in forms.FORMS:
            ours = run(form, layout, x)
            assert oracle.error(ours.y, truth.y) <= var_tolerance / 2 + TOLERANCE / 4, form
            size = np.maximum(np.abs(truth.mean), np.sqrt(truth.var))
            assert np.all(np.abs(ours.mean - truth.mean) <= 4 * 2e-7 * size), form
            allowed = var_tolerance * truth.var + LEAST_VARIANCE
            assert np.all(np.abs(ours.var - truth.var) <= allowed), form


@every_form
@pytest.mark.parametrize("mean", [0.0, 0.95, 1.5, 1.95, 1e3])
def test_features_first(mean, form):
    """The compiler reduces over other axes, and adds in another order."""
    rng = np.random.default_rng(7)
    x = (mean + rng.normal(size=(16, 8, 1000))).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    scale, bias = SCALE[:8], BIAS[:8]
    truth = oracle.batch_norm(x, dy, scale, bias, axis=1)
    assert_accurate(step_in(form, 1)(x, dy, None, scale, bias), truth, form)


@every_form
@pytest.mark.parametrize("value", CONSTANTS)
@pytest.mark.parametrize("shape", [(2,), (1000,), (4096,), (4, 33, 17)])
def test_a_constant_feature_is_exactly_zero_before_the_bias(value, shape, form):
    x = np.random.default_rng(4).normal(size=(*shape, 3)).astype(np.float32)
    x[..., 1] = value
    scale, bias = np.array([2, 3, 4], np.float32), np.array([5, 6, 7], np.float32)
    dy = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)
    y, dx, dscale, *_ = step_in(form)(x, dy, None, scale, bias)
    np.testing.assert_array_equal(y[..., 1], 6)
    assert dscale[1] == 0
    truth = oracle.batch_norm(x, dy, scale, bias)
    assert oracle.error(dx[..., 1], truth.dx[..., 1]) <= TOLERANCE


@pytest.mark.parametrize("name", INPUTS)
def test_running_statistics(name):
    """Each mean has the error of a rounding of its size, or of the deviation if that is larger."""
    x = INPUTS[name].astype(np.float32)
    truth = oracle.batch_norm(x, DY, SCALE, BIAS)
    size = np.maximum(np.abs(truth.mean), np.sqrt(truth.var))
    for form, layout in itertools.product(forms.FORMS, LAYOUTS):
        error = np.abs(run(form, layout, x).mean - truth.mean)
        assert np.all(error <= 2e-7 * size), (form, layout)


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
        mean = jnp.mean(x, 0, keepdims=True)
        var = jnp.mean(x * x, 0, keepdims=True) - mean**2
        return (x - mean) / jnp.sqrt(jnp.abs(var) + 1e-5)

    assert oracle.error(naive(x), oracle.batch_norm(x, x).y) > 100 * TOLERANCE


@pytest.mark.parametrize("key", oracle.Result._fields)
def test_an_error_in_any_result_would_be_caught(key):
    """The error is 1.1e-6 of the largest value, in all values."""
    x = INPUTS["N(1e3, 1)"].astype(np.float32)
    truth = oracle.batch_norm(x, DY, SCALE, BIAS)
    assert_accurate(truth, truth, "cpu")
    exact = getattr(truth, key)
    wrong = exact + 1.1 * TOLERANCE * np.max(np.abs(exact))
    with pytest.raises(AssertionError, match=key):
        assert_accurate(truth._replace(**{key: wrong}), truth, "cpu")
