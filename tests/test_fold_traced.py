"""`fold_linen` with a model: pairs and options from the layers, checked on an example."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import jaxbn.linen
from jaxbn.inference import find_pairs, fold_linen
from tests.close import assert_equal
from tests.fold_models import (
    CHANNELS,
    Model,
    StandardizedConv,
    conv,
    images,
    linen,
    lively,
    norm,
    variables_of,
)
from tests.raises import raises


def no_norm(**options):
    return lambda x: x


class Block(nn.Module):
    norm: Callable[..., Any]
    use_bias: bool
    train: bool = False

    @nn.compact
    def __call__(self, x):
        norm = partial(self.norm, use_running_average=not self.train)
        y = nn.relu(norm(epsilon=0.1)(conv(use_bias=self.use_bias)(x)))
        up = nn.ConvTranspose(CHANNELS, (3, 3), transpose_kernel=True, use_bias=self.use_bias)
        return nn.relu(x + norm(epsilon=1e-3)(up(y)))


class Network(nn.Module):
    """Norms of different epsilons, kernels of different output axes, and blocks in nn.remat."""

    norm: Callable[..., Any] = jaxbn.linen.BatchNorm
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = Block(self.norm, self.use_bias, train)(x)
        x = nn.remat(Block)(self.norm, self.use_bias, train)(x)
        x = nn.Dense(3, use_bias=self.use_bias)(x.reshape(len(x), -1))
        return self.norm(use_running_average=not train, use_scale=False)(x)


WITHOUT_NORMS = Network(no_norm, use_bias=True)
# The number of layers, and of products in their longest sum.
LAYERS, PRODUCTS = 5, 6 * 5 * CHANNELS


def assert_near(got, expected):
    """Compare within the rounding of all sums, if no layer amplifies what was rounded before it."""
    tolerance = 2 * LAYERS * (PRODUCTS + 10) * 2.0**-53 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.fixture(
    params=[jaxbn.linen.BatchNorm, nn.BatchNorm, jaxbn.linen.BatchRenorm], ids=lambda c: str(c)
)
def network(request, x64):
    """Return a model, variables, and an input."""
    model, x = Network(request.param), images(jnp.float64)
    return model, variables_of(model, x, jnp.float64, train=False), x


def test_the_model_without_norms_computes_the_same(network):
    model, variables, x = network
    before = jax.tree.map(np.array, variables)
    folded = fold_linen(variables, model=model, example=x, train=False)
    assert_equal(variables, before)
    assert_near(WITHOUT_NORMS.apply(folded, x, False), model.apply(variables, x, False))
    fresh = jax.eval_shape(partial(WITHOUT_NORMS.init, train=False), jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, fresh)


def test_each_epsilon_and_axis_is_that_of_the_layer(network):
    model, variables, x = network
    folded = fold_linen(variables, model=model, example=x, train=False)
    pairs = find_pairs(model, variables, x, train=False)
    one_by_one = variables
    for pair, epsilon in zip(pairs.items(), (0.1, 1e-3, 0.1, 1e-3, 1e-5), strict=True):
        axis = -2 if "Transpose" in pair[0] else -1
        one_by_one = fold_linen(one_by_one, [pair], epsilon=epsilon, axis=axis)
    assert_equal(folded, one_by_one)


PAIRS = {"Conv_1": "BatchNorm_1", "Conv_0": "BatchNorm_0"}


class TestCalls:
    """Different ways to ask for the same."""

    MODEL, VARIABLES, X = linen(lambda x: norm()(conv()(nn.relu(norm()(conv()(x))))))
    call = staticmethod(partial(fold_linen, model=MODEL, example=X))

    def test_given_pairs_options_and_containers(self):
        expected = fold_linen(self.VARIABLES, PAIRS, epsilon=1e-3)
        assert_equal(self.call(self.VARIABLES), expected)
        assert_equal(self.call(freeze(self.VARIABLES)), expected)
        assert_equal(self.call(self.VARIABLES, PAIRS.items(), epsilon=1e-3, axis=3), expected)
        assert_equal(fold_linen(self.VARIABLES, model=self.MODEL, example=(self.X,)), expected)

    def test_the_given_pairs_only(self):
        pairs = {"Conv_1": "BatchNorm_1"}
        expected = fold_linen(self.VARIABLES, pairs, epsilon=1e-3)
        assert_equal(self.call(self.VARIABLES, pairs), expected)
        assert set(expected["batch_stats"]) == {"BatchNorm_0"}

    def test_norms_that_cannot_be_folded_stay_on_request(self):
        model, variables, x = linen(lambda x: norm()(nn.relu(norm()(conv()(x)))))
        variables["batch_stats"]["BatchNorm_1"]["var"] *= 3
        pairs = find_pairs(model, variables, x)
        folded = fold_linen(variables, pairs, model=model, example=x)
        assert set(folded["batch_stats"]) == {"BatchNorm_0"}

    def test_overridden_options(self):
        overridden = jaxbn.linen.override(fold_linen, {"**": {"epsilon": 0.5}})
        got = overridden(self.VARIABLES, model=self.MODEL, example=self.X)
        assert_equal(got, fold_linen(self.VARIABLES, PAIRS, epsilon=0.5))

    def test_jit(self):
        got = jax.jit(self.call)(self.VARIABLES)
        # The compiler contracts products and sums.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
            got,
            self.call(self.VARIABLES),
        )

    def test_boxes(self):
        boxed = nn.with_partitioning(nn.initializers.ones, (None, None, None, "model"))
        call = lambda x: norm()(conv(kernel_init=boxed, use_bias=False)(x))  # noqa: E731
        model, variables, x = linen(call)
        kernel = fold_linen(variables, model=model, example=x)["params"]["Conv_0"]["kernel"]
        assert type(kernel) is nn.Partitioned
        plain = fold_linen(nn.meta.unbox(variables), {"Conv_0": "BatchNorm_0"}, epsilon=1e-3)
        assert_equal(kernel.unbox(), plain["params"]["Conv_0"]["kernel"])

    def test_a_bias_of_more_axes_under_any_name(self):
        local = partial(nn.ConvLocal, CHANNELS, (3, 3), name="local")
        model, variables, x = linen(lambda x: norm()(local(use_bias=False)(x)))
        folded = fold_linen(variables, model=model, example=x)
        assert folded["params"]["local"]["bias"].shape == (*x.shape[1:3], CHANNELS)
        got = Model(lambda x: local()(x)).apply(folded, x)
        expected = model.apply(variables, x)
        # Sums of 36 products in float32, and about ten roundings more.
        np.testing.assert_allclose(got, expected, atol=2 * 46 * 2.0**-24 * np.abs(expected).max())

    def test_a_layer_that_shares_its_scope(self):
        class Shared(nn.Module):
            norm: Any = norm
            use_bias: bool = False

            def setup(self):
                self.conv, self.bn = conv(use_bias=self.use_bias), self.norm()
                nn.share_scope(self, self.conv)

            def __call__(self, x):
                return self.bn(self.conv(x))

        model, variables, x = linen(lambda x: Shared(name="block")(x))
        folded = fold_linen(variables, model=model, example=x)
        assert set(folded["params"]["block"]) == {"kernel", "bias"}
        without = Model(lambda x: Shared(norm=lambda: no_norm(), use_bias=True, name="block")(x))
        got, expected = without.apply(folded, x), model.apply(variables, x)
        # Sums of 36 products in float32, and about ten roundings more.
        np.testing.assert_allclose(got, expected, atol=2 * 46 * 2.0**-24 * np.abs(expected).max())


class TestTheCheckOnTheExample:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    @pytest.mark.parametrize("use_bias", [False, True])
    @pytest.mark.parametrize("same_dtype", [False, True])
    def test_it_allows_for_rounding(self, dtype, use_bias, same_dtype):
        """Means that cancel most of the output, small variances, and wide sums."""
        model, _, x = linen(
            lambda x: norm(dtype=dtype if same_dtype else None)(
                nn.Conv(64, (3, 3), use_bias=use_bias, dtype=dtype)(x)
            )
        )
        x = jnp.tile(x, (1, 1, 1, 32))
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        variables = lively(shapes)
        outputs = conv_outputs(variables, x)
        variables["batch_stats"]["BatchNorm_0"] = {
            "mean": outputs.mean((0, 1, 2)),
            "var": 1e-3 * outputs.var((0, 1, 2)),
        }
        got = fold_linen(variables, model=model, example=x)
        assert_equal(got, fold_linen(variables, {"Conv_0": "BatchNorm_0"}, epsilon=1e-3))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_it_allows_for_the_rounding_of_stored_values(self, dtype):
        """A checkpoint in half precision, for inputs and computations in float32."""
        model, variables, x = linen(lambda x: norm()(conv()(x)))
        variables["params"]["Conv_0"] = lively(variables["params"]["Conv_0"], dtype)
        folded = fold_linen(variables, model=model, example=x)
        assert folded["params"]["Conv_0"]["kernel"].dtype == dtype
        assert_equal(folded, fold_linen(variables, {"Conv_0": "BatchNorm_0"}, epsilon=1e-3))

        model, variables, x = linen(lambda x: norm()(StandardizedConv(name="conv")(x)))
        variables["params"]["conv"] = lively(variables["params"]["conv"], dtype)
        with pytest.raises(ValueError, match="times what rounding explains"):
            fold_linen(variables, model=model, example=x)

    def test_a_layer_that_is_not_linear_in_its_kernel(self):
        model, variables, x = linen(lambda x: norm()(StandardizedConv(name="conv")(x)))
        assert find_pairs(model, variables, x) == {"conv": "BatchNorm_0"}
        with pytest.raises(ValueError) as raised:
            fold_linen(variables, model=model, example=x)
        text = str(raised.value)
        start = (
            "conv and BatchNorm_0 cannot be folded: on example, the folded layer's output differs "
            "from the batch norm's by "
        )
        end = (
            " times what rounding explains. The output of conv may not be linear in its kernel and "
            "bias, or its folded values are out of the range of their dtype."
        )
        assert text.startswith(start) and text.endswith(end)
        assert float(text.removeprefix(start).removesuffix(end)) > 1000

    @pytest.mark.parametrize(
        "value, why",
        [
            (0, "the input of Conv_0 is zero"),
            (np.nan, "the output of BatchNorm_0 has no finite value"),
        ],
    )
    def test_an_example_on_which_nothing_can_be_checked(self, value, why):
        """A layer without a bias maps zeros to zeros, whatever its kernel is."""
        model, variables, x = linen(lambda x: norm()(conv(use_bias=False)(x)))
        with raises(
            ValueError,
            f"example must be one on which the folded layers can be checked, but {why}. Pass an "
            f"input from the data, or leave this pair out of pairs.",
        ):
            fold_linen(variables, model=model, example=jnp.full_like(x, value))

    def test_folded_values_out_of_range(self):
        model, variables, x = linen(
            lambda x: norm()(conv(dtype=jnp.float16, param_dtype=jnp.float16)(x))
        )
        params = variables["params"]
        params["Conv_0"] = jax.tree.map(lambda v: v.astype(jnp.float16), params["Conv_0"])
        params["BatchNorm_0"]["scale"] *= 1e6
        with pytest.raises(ValueError, match="differs from the batch norm's by nan times"):
            fold_linen(variables, model=model, example=x)


def conv_outputs(variables, x):
    params = {"params": {"kernel": variables["params"]["Conv_0"]["kernel"]}}
    return np.asarray(nn.Conv(64, (3, 3), use_bias=False).apply(params, x), np.float32)
