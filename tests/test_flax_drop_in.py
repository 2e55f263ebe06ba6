"""A Linen model that changes one import gets the arguments, numbers and dtypes of Flax."""

from functools import partial

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
from tests.drop_in import KEY, TOLERANCE, X, assert_close

ours, theirs = jaxbn.linen.BatchNorm, nn.BatchNorm


def trained(layer, x, **call):
    """Return outputs and variables of the initialization, two steps, and an evaluation."""
    initial, variables = layer.init_with_output(KEY, x, False, **call)
    results = [initial, variables]
    for k in range(2):
        y, updates = layer.apply(variables, x + k, False, mutable=["batch_stats"], **call)
        variables = {**variables, **updates}
        results += [y, variables]
    return [*results, layer.apply(variables, x, True, **call)]


def test_a_comparison_can_fail():
    with pytest.raises(AssertionError):
        assert_close(trained(ours(momentum=0.9), X), trained(theirs(), X))


class TestArguments:
    @pytest.mark.usefixtures("standard_promotion")
    def test_positional(self):
        """All fourteen of Flax, in its order."""
        arguments = (
            *(None, 0, 0.7, 1e-3, jnp.bfloat16, jnp.float32, True, False),
            *(nn.initializers.constant(0.5), nn.initializers.ones, "data", None, False, False),
        )

        def run(layer):
            return jax.vmap(partial(trained, layer(*arguments)), axis_name="data")(
                X.reshape(2, 4, 6)
            )

        # Two roundings to eight bits, of values up to three.
        assert_close(run(ours), run(theirs), 3 * 2.0**-7)

    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("wide", [True, False])
    def test_options_without_effect(self, fast, wide):
        options = {"use_fast_variance": fast, "force_float32_reductions": wide}
        got = trained(ours(**options), X)
        jax.tree.map(np.testing.assert_array_equal, got, trained(ours(), X))
        assert_close(got, trained(theirs(**options), X))

    def test_a_batch_of_one_row_trains(self):
        assert_close(trained(ours(), X[:1]), trained(theirs(), X[:1]))

    @pytest.mark.parametrize("axis", [(0, 1), (1, -1), [1]], ids=str)
    def test_several_feature_axes(self, axis):
        x = X.reshape(4, 2, 6)
        assert_close(trained(ours(axis=axis), x), trained(theirs(axis=axis), x))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("of_input", ["bool", "uint8", "int32", "float16"])
def test_dtypes(of_input, dtype, param_dtype):
    x = (X > 1).astype(of_input) if of_input == "bool" else np.abs(4 * X).astype(of_input)
    options = {"dtype": dtype, "param_dtype": param_dtype}
    got, wanted = trained(ours(**options), x), trained(theirs(**options), x)
    # Two roundings to the output's dtype, of values up to three; the rest are in float32.
    assert_close(got, wanted, max(TOLERANCE, 3 * float(jnp.finfo(got[0].dtype).eps)))


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_a_wide_dtype_widens_the_computation():
    x = np.float32(1e4) + X
    got, wanted = (trained(layer(dtype="float64"), x) for layer in (ours, theirs))
    # The squares of 1e4 cost float64 eight of its sixteen digits.
    assert_close(got, wanted, 1e-7)


class TestMasks:
    mask = np.random.default_rng(1).random((8, 1)) < 0.6

    def test_where_it_counts(self):
        """Statistics and outputs are Flax's. A masked-out input is NaN, and its output the bias."""
        x = np.where(self.mask, X, np.nan)
        got, wanted = (trained(layer(), x, mask=self.mask) for layer in (ours, theirs))

        def counted(results):
            return [r[self.mask[:, 0]] if isinstance(r, jax.Array) else r for r in results]

        assert_close(counted(got), counted(wanted))
        for y in got[::2]:
            np.testing.assert_array_equal(np.asarray(y)[~self.mask[:, 0]], 0)

    @pytest.mark.parametrize("kind", ["int32", "uint8", "float32", "bfloat16", list])
    def test_of_numbers(self, kind):
        mask = self.mask.astype(int).tolist() if kind is list else jnp.asarray(self.mask, kind)
        got, wanted = (trained(ours(), X, mask=m) for m in (mask, self.mask))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
        flax = trained(theirs(), X, mask=mask)
        assert_close(got[-2], flax[-2])

    def test_that_are_neither(self):
        with pytest.raises(TypeError) as raised:
            trained(ours(), X, mask=jnp.ones((8, 1), jnp.complex64))
        assert str(raised.value) == "mask must be an array of booleans, got complex64."

    def test_function_keeps_refusing_numbers(self):
        params, state = jaxbn.init(X.shape)
        with pytest.raises(TypeError, match=r"^mask must be an array of booleans, got int32"):
            jaxbn.batch_norm(params, state, X, True, mask=jnp.ones((8, 1), jnp.int32))
        with pytest.raises(TypeError, match=r"^x must be of a floating dtype, got int32"):
            jaxbn.batch_norm(params, state, jnp.ones((8, 6), jnp.int32), True)


class TestCumulativeAverage:
    def test_over_statistics_without_count(self):
        """The first batch does not replace trained statistics."""
        layer = ours(momentum=None)
        variables = ours().init(KEY, X, False)
        with pytest.raises(ValueError) as raised:
            layer.apply(variables, X, False, mutable=["batch_stats"])
        assert str(raised.value) == (
            "momentum=None, the cumulative average, needs the number of batches so far: state must "
            "have 'count', as init(..., track_count=True) makes it."
        )
        # Evaluation needs no count, and adds none.
        y, updates = layer.apply(variables, X, True, mutable=["batch_stats"])
        np.testing.assert_array_equal(y, ours().apply(variables, X, True))
        assert set(updates["batch_stats"]) == {"mean", "var"}

    def test_from_the_start(self):
        *_, variables, _ = trained(ours(momentum=None), X)
        assert variables["batch_stats"]["count"] == 2
        # The mean of X and X + 1.
        np.testing.assert_allclose(variables["batch_stats"]["mean"], X.mean(0) + 0.5, rtol=1e-5)

    def test_immutable_statistics(self):
        layer = ours(momentum=None)
        with pytest.raises(flax.errors.ModifyScopeVariableError) as raised:
            layer.apply(layer.init(KEY, X, False), X, False)
        assert "mutable=['batch_stats']" in raised.value.__notes__[0]


class TestWhatRemainsDifferent:
    def test_epsilon_zero_in_training(self):
        with pytest.raises(ValueError, match=r"^epsilon must be at least 1\.2e-38"):
            ours(epsilon=0.0).init(KEY, X, False)
        variables = ours().init(KEY, X, False)
        assert_close(
            ours(epsilon=0.0).apply(variables, X, True),
            theirs(epsilon=0.0).apply(variables, X, True),
        )

    def test_mask_in_evaluation(self):
        mask = np.arange(8)[:, None] < 4
        variables = ours().init(KEY, X, False)
        y, flax = (layer().apply(variables, X, True, mask=mask) for layer in (ours, theirs))
        assert_close(y[:4], flax[:4])
        np.testing.assert_array_equal(y[4:], 0)
        assert_close(flax, theirs().apply(variables, X, True))

    def test_no_gradient_flows_into_new_statistics(self):
        def total(norm, x):
            updates = norm().apply(norm().init(KEY, X, False), x, False, mutable=["batch_stats"])[1]
            return sum(map(jnp.sum, jax.tree.leaves(updates)))

        np.testing.assert_array_equal(jax.grad(partial(total, ours))(X), 0)
        assert np.abs(jax.grad(partial(total, theirs))(X)).min() > 0
