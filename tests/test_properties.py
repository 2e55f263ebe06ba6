"""Properties that hold for every input, tested on inputs from Hypothesis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxbn

settings.register_profile("jaxbn", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("jaxbn")

# Few shapes, since each is compiled once; values of many sizes, none so small that epsilon rules.
SHAPES = [(2, 1), (7, 3), (4, 5, 2)]
inputs = st.sampled_from(SHAPES).flatmap(
    lambda shape: hnp.arrays(
        np.float64, shape, elements=st.floats(-1e3, 1e3).map(lambda v: round(v, 3))
    )
)
seeds = st.integers(0, 2**31)

# Values up to 1e3 in float64 with an epsilon of 1e-5: 2e-16 * (1e3)^2 / 1e-5 at the worst.
TOLERANCE = 2e-5


@pytest.fixture(autouse=True, scope="module")
def _x64():
    with jax.enable_x64(True):
        yield


@jax.jit
def normalize(x, mask=None, epsilon=1e-5):
    return jaxbn.batch_norm({}, None, x, True, mask=mask, epsilon=epsilon)[0]


@jax.jit
def statistics(x, mask=None):
    """Return the batch's mean and unbiased variance."""
    state = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.zeros(x.shape[-1])}
    _, state = jaxbn.batch_norm({}, state, x, True, momentum=0.0, mask=mask)
    return state["mean"], state["var"]


@given(inputs, st.floats(-1e3, 1e3))
def test_a_shift_of_the_input_leaves_the_output(x, shift):
    np.testing.assert_allclose(normalize(x + shift), normalize(x), atol=TOLERANCE)


@given(inputs, st.floats(0.1, 10))
def test_a_scale_of_the_input_is_a_scale_of_epsilon(x, factor):
    y = normalize(x * factor, epsilon=1e-5 * factor**2)
    np.testing.assert_allclose(y, normalize(x), atol=TOLERANCE)


@given(inputs)
def test_the_output_has_mean_zero_and_variance_one_or_less(x):
    y, axes = np.asarray(normalize(x)), tuple(range(x.ndim - 1))
    np.testing.assert_allclose(y.mean(axes), 0, atol=TOLERANCE)
    var = x.var(axes)
    np.testing.assert_allclose(y.var(axes), var / (var + 1e-5), atol=TOLERANCE)


@given(inputs, seeds)
def test_the_gradient_has_mean_zero_and_no_part_along_the_output(x, seed):
    dy = np.random.default_rng(seed).normal(size=x.shape)
    y, vjp = jax.vjp(normalize, x)
    (dx,) = vjp(dy)
    axes = tuple(range(x.ndim - 1))
    var = x.var(axes)
    # dx is a difference of terms of the size of dy / std: its rounding has that size.
    rounding = 1e-12 * np.abs(dy).max() / np.sqrt(var + 1e-5)
    assert np.all(np.abs(np.mean(dx, axes)) <= rounding)
    # The component along x_hat is only what epsilon leaves.
    left = 1e-5 / (var + 1e-5) ** 1.5 * np.mean(dy * y, axes)
    assert np.all(np.abs(np.mean(dx * y, axes) - left) <= 1e3 * rounding)


@given(inputs, st.data())
def test_the_statistics_of_a_concatenation_are_those_of_the_whole(x, data):
    """Merge counts, means and variances by the law of total variance."""
    mask = np.ones((*x.shape[:-1], 1), bool)
    cut = data.draw(st.integers(0, x.shape[0]))
    mask[cut:] = False
    parts = [(m.sum(), *map(np.asarray, statistics(x, m))) for m in (mask, ~mask)]
    n = sum(part[0] for part in parts)
    mean = sum(k * m for k, m, _ in parts) / n
    squares = sum(max(k - 1, 0) * v + k * (m - mean) ** 2 for k, m, v in parts)
    whole = statistics(x)
    np.testing.assert_allclose(whole[0], mean, atol=1e-9)
    np.testing.assert_allclose(whole[1], squares / (n - 1), rtol=1e-9, atol=1e-6)


@given(inputs, seeds)
def test_a_mask_equals_leaving_the_values_out(x, seed):
    mask = np.random.default_rng(seed).random(x.shape[:-1]) < 0.6
    assume(mask.sum() >= 2)
    kept = x[mask]
    y = normalize(np.where(mask[..., None], x, np.nan), mask[..., None])
    np.testing.assert_allclose(y[mask], jaxbn.batch_norm({}, None, kept, True)[0], atol=TOLERANCE)
    assert np.all(np.asarray(y)[~mask] == 0)


@given(inputs, seeds)
def test_the_order_of_the_examples_does_not_matter(x, seed):
    order = np.random.default_rng(seed).permutation(len(x))
    np.testing.assert_allclose(normalize(x[order]), normalize(x)[order], atol=TOLERANCE)


@given(inputs)
def test_the_running_mean_lies_between_the_extremes(x):
    mean, var = statistics(x)
    axes = tuple(range(x.ndim - 1))
    slack = 1e-12 * (1 + np.abs(x).max())
    assert np.all(mean >= x.min(axes) - slack) and np.all(mean <= x.max(axes) + slack)
    assert np.all(var >= 0)
