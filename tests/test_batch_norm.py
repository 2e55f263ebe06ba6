"""The contract of `init` and `batch_norm`."""

from types import MappingProxyType

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import oracle

# Statistics of order one from some ten values, in float32: ten roundings.
TOLERANCE = 1e-6


def ones_and_zeros(leaves):
    return {k: (v.shape, v.dtype, float(v.reshape(-1)[0])) for k, v in leaves.items()}


def normal(shape, seed=0, dtype=np.float32):
    return (2 + 3 * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


class TestInit:
    def test_defaults(self):
        params, state = jaxbn.init((4, 8, 3))
        assert ones_and_zeros(params) == {
            "scale": ((3,), jnp.float32, 1.0),
            "bias": ((3,), jnp.float32, 0.0),
        }
        assert ones_and_zeros(state) == {
            "mean": ((3,), jnp.float32, 0.0),
            "var": ((3,), jnp.float32, 1.0),
        }

    @pytest.mark.parametrize(
        ("axis", "keepdims", "shape"),
        [
            (1, False, (5,)),
            (-2, False, (5,)),
            (1, True, (1, 5, 1)),
            ((0, 2), False, (4, 6)),
            ((2, 0), False, (4, 6)),
            ((-1, 1), True, (1, 5, 6)),
            ((0, 1, 2), False, (4, 5, 6)),
        ],
    )
    def test_shapes(self, axis, keepdims, shape):
        params, state = jaxbn.init((4, 5, 6), axis, keepdims=keepdims)
        assert {leaf.shape for leaf in [*params.values(), *state.values()]} == {shape}

    def test_without_scale_or_bias(self):
        assert set(jaxbn.init((2, 3), use_scale=False)[0]) == {"bias"}
        assert set(jaxbn.init((2, 3), use_bias=False)[0]) == {"scale"}
        assert jaxbn.init((2, 3), use_scale=False, use_bias=False)[0] == {}

    def test_count(self):
        _, state = jaxbn.init((2, 3), track_count=True)
        assert state["count"].shape == () and state["count"].dtype == jnp.int32
        assert state["count"] == 0

    @pytest.mark.parametrize(
        ("param_dtype", "state_dtype"),
        [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")],
    )
    def test_statistics_are_kept_in_float32_at_least(self, x64, param_dtype, state_dtype):
        params, state = jaxbn.init((2, 3), param_dtype=param_dtype)
        assert {str(p.dtype) for p in params.values()} == {param_dtype}
        assert {str(s.dtype) for s in state.values()} == {state_dtype}


class TestShapes:
    @pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (1, -1)])
    @pytest.mark.parametrize("train", [True, False])
    def test_leaves_of_either_shape(self, axis, train):
        x = normal((4, 5, 6))
        results = []
        for keepdims in (False, True):
            params, state = jaxbn.init(x.shape, axis, keepdims=keepdims)
            params = {
                k: v + jnp.arange(v.size, dtype=v.dtype).reshape(v.shape) for k, v in params.items()
            }
            y, new = jaxbn.batch_norm(params, state, x, train, axis=axis)
            assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in state.items()}
            results.append((y, {k: v.reshape(-1) for k, v in new.items()}))
        jax.tree.map(np.testing.assert_array_equal, *results)

    def test_several_feature_axes_are_one_long_one(self):
        x = normal((7, 4, 6))
        y, state = jaxbn.batch_norm({}, jaxbn.init(x.shape, (1, 2))[1], x, True, axis=(1, 2))
        flat = x.reshape(7, 24)
        wanted, wanted_state = jaxbn.batch_norm({}, jaxbn.init(flat.shape)[1], flat, True)
        np.testing.assert_allclose(y.reshape(7, 24), wanted, rtol=0, atol=TOLERANCE)
        for key in wanted_state:
            np.testing.assert_allclose(state[key].reshape(-1), wanted_state[key], rtol=TOLERANCE)

    def test_other_mappings_serve_as_dicts(self):
        x = normal((5, 3))
        params, state = jaxbn.init(x.shape)
        for train in (True, False):
            wanted, _ = jaxbn.batch_norm(params, state, x, train)
            for mapping in (MappingProxyType, flax.core.freeze):
                got, _ = jaxbn.batch_norm(mapping(params), mapping(state), x, train)
                np.testing.assert_array_equal(got, wanted)


class TestDtypes:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("out", [None, "float16", "bfloat16", "float32", "float64"])
    @pytest.mark.parametrize("train", [True, False])
    def test_output_and_statistics(self, x64, dtype, out, train):
        x = jnp.asarray(normal((6, 3)), dtype)
        params, state = jaxbn.init(x.shape)
        y, new = jaxbn.batch_norm(params, state, x, train, dtype=out)
        assert y.dtype == jnp.dtype(out or dtype)
        kept = "float64" if train and dtype == "float64" else "float32"
        assert {str(v.dtype) for v in new.values()} == {kept}
        if train:
            truth = oracle.batch_norm(x, x)
            half = min(jnp.finfo(y.dtype).nmant, jnp.finfo(x.dtype).nmant)
            # Rounded once to the output's dtype, and computed in float32 at least.
            assert oracle.error(y, truth.y) <= 2.0 ** (-half - 1) + TOLERANCE

    def test_half_precision_is_summed_in_float32(self):
        x = jnp.full((5000, 1), 3, jnp.float16).at[::2].set(5)
        y, state = jaxbn.batch_norm({}, jaxbn.init(x.shape)[1], x, True, momentum=0.0)
        assert state["mean"][0] == 4
        assert abs(float(y[0, 0]) - 1) < 1e-3

    @pytest.mark.parametrize(
        "dtype",
        [
            *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn"),
            *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float4_e2m1fn"),
        ],
    )
    def test_eight_and_four_bits(self, dtype):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32).astype(dtype)
        y, new = jaxbn.batch_norm({}, jaxbn.init(x.shape)[1], x, True, momentum=0.0)
        truth = oracle.batch_norm(x.astype(jnp.float32), x.astype(jnp.float32))
        assert y.dtype == jnp.dtype(dtype)
        # Rounded once: by half a unit in the last place, which below the smallest normal number is
        # that of the smallest normal number.
        info = jnp.finfo(dtype)
        rounding = 2.0 ** -(info.nmant + 1) * np.maximum(np.abs(truth.y), float(info.tiny))
        wrong = np.abs(np.asarray(y.astype(jnp.float32)) - truth.y)
        assert np.all(wrong <= rounding * 1.00001)
        assert {str(leaf.dtype) for leaf in new.values()} == {"float32"}
        assert oracle.error(new["mean"], truth.mean) <= TOLERANCE


class TestState:
    def test_evaluation_returns_it_as_it_was(self):
        x = normal((6, 3))
        params, _ = jaxbn.init(x.shape)
        state = {"mean": jnp.arange(3.0), "var": jnp.arange(1.0, 4.0), "count": jnp.int32(7)}
        y, new = jaxbn.batch_norm(params, state, x, False)
        jax.tree.map(np.testing.assert_array_equal, new, state)
        wanted = (x - np.arange(3)) / np.sqrt(np.arange(1, 4) + 1e-5)
        np.testing.assert_allclose(y, wanted, rtol=TOLERANCE, atol=TOLERANCE)

    def test_none_is_none_in_both_modes(self):
        x = normal((6, 3))
        truth = oracle.batch_norm(x, x)
        for train in (True, False):
            y, state = jaxbn.batch_norm({}, None, x, train)
            assert state is None
            assert oracle.error(y, truth.y) <= TOLERANCE

    @pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0, None])
    def test_every_training_batch_adds_one_to_the_count(self, momentum):
        _, state = jaxbn.init((6, 3), track_count=True)
        for step in range(3):
            assert state["count"] == step
            _, state = jaxbn.batch_norm({}, state, normal((6, 3)), True, momentum=momentum)
        _, state = jaxbn.batch_norm({}, state, normal((6, 3)), False, momentum=momentum)
        assert state["count"] == 3 and state["count"].dtype == jnp.int32

    def test_the_cumulative_average_weighs_all_batches_alike(self):
        _, state = jaxbn.init((6, 3), track_count=True)
        batches = [normal((6, 3), seed) for seed in range(5)]
        for x in batches:
            _, state = jaxbn.batch_norm({}, state, x, True, momentum=None)
        np.testing.assert_allclose(state["mean"], np.mean([b.mean(0) for b in batches], 0), 1e-6)
        var = np.mean([b.var(0, ddof=1) for b in batches], 0)
        np.testing.assert_allclose(state["var"], var, 1e-6)

    def test_the_cumulative_average_holds_after_many_batches(self):
        state = {"mean": jnp.zeros(1), "var": jnp.ones(1), "count": jnp.int32(10**6 - 1)}
        x = jnp.array([[1.0], [3.0]])
        _, state = jaxbn.batch_norm({}, state, x, True, momentum=None)
        np.testing.assert_allclose(state["mean"], 2e-6, rtol=1e-6)

    def test_no_gradient_flows_into_it(self):
        x = jnp.asarray(normal((6, 3)))
        params, state = jaxbn.init(x.shape)

        def total(x, state):
            _, new = jaxbn.batch_norm(params, state, x, True)
            return sum(jnp.sum(leaf**2) for leaf in new.values())

        for leaf in jax.tree.leaves(jax.grad(total, (0, 1))(x, state)):
            np.testing.assert_array_equal(leaf, 0)

    def test_a_traced_momentum(self):
        x = normal((6, 3))
        params, state = jaxbn.init(x.shape)
        step = jax.jit(lambda m: jaxbn.batch_norm(params, state, x, True, momentum=m)[1])
        for momentum in (0.5, 0.75):
            wanted = jaxbn.batch_norm(params, state, x, True, momentum=momentum)[1]
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, 1e-6), step(momentum), wanted
            )


class TestOneValue:
    def test_biased_conventions_allow_it(self):
        x = np.array([[4.0, 5.0]], np.float32)
        params, state = jaxbn.init(x.shape)
        y, new = jaxbn.batch_norm(params, state, x, True, **jaxbn.FLAX)
        np.testing.assert_array_equal(y, 0)
        np.testing.assert_allclose(new["mean"], [0.04, 0.05], rtol=1e-6)
        np.testing.assert_allclose(new["var"], 0.99, rtol=1e-6)

    def test_evaluation_allows_it(self):
        x = np.array([[4.0, 5.0]], np.float32)
        params, state = jaxbn.init(x.shape)
        y, _ = jaxbn.batch_norm(params, state, x, False)
        np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=TOLERANCE)


@pytest.mark.parametrize("train", [True, False])
def test_non_finite_values_show(train):
    x = normal((6, 3))
    x[2, 1] = np.nan
    params, state = jaxbn.init(x.shape)
    y, new = jaxbn.batch_norm(params, state, x, train)
    assert np.isnan(y[2, 1]) and np.all(np.isfinite(y[:, [0, 2]]))
    assert np.isnan(new["mean"][1]) == train
