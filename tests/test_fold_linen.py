"""`fold_linen`: models without their batch norms compute what they computed with them."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import jaxbn
import jaxbn.linen
from jaxbn.inference import fold, fold_linen
from tests.close import assert_equal
from tests.folding import EPSILON, HIGHEST, IN, OUT, conv, lively_norm, shapes


class Block(nn.Module):
    norm: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        x = conv(use_bias=self.use_bias)(x)
        if self.norm:
            x = jaxbn.linen.BatchNorm(True, epsilon=EPSILON)(x)
        return nn.relu(x)


class Network(nn.Module):
    """With a norm in a block, one that has no parameters, and one that is not folded."""

    norm: bool = True
    use_bias: bool = False

    @nn.compact
    def __call__(self, x):
        x = Block(self.norm, self.use_bias)(x)
        x = jaxbn.linen.BatchNorm(True, epsilon=EPSILON)(x)
        x = nn.Dense(3, use_bias=self.use_bias, precision=HIGHEST)(x)
        if self.norm:
            x = jaxbn.linen.BatchNorm(
                True, epsilon=EPSILON, use_scale=False, use_bias=False, name="plain"
            )(x)
        return x


class Then(nn.Module):
    """A layer under the name that Flax gives it, and a norm."""

    layer: Callable[[], nn.Module]
    norm: nn.Module | None

    @nn.compact
    def __call__(self, x):
        y = self.layer()(x)
        return y if self.norm is None else self.norm(y)


# The layer, the shape of its input, and whether the kernel determines the shape of the bias.
MANY_BIASES = {
    "ConvLocal": (partial(partial, nn.ConvLocal, OUT, (3, 2)), (2, 4, 4, IN), True),
    "DenseGeneral": (partial(partial, nn.DenseGeneral, (3, OUT)), (2, IN), False),
    "DenseGeneral, batched": (
        partial(partial, nn.DenseGeneral, (3, OUT), batch_dims=0),
        (2, IN),
        False,
    ),
    "DenseGeneral, one bias": (partial(partial, nn.DenseGeneral, OUT, (1, 2)), (2, 3, IN), False),
    "Einsum": (partial(partial, nn.Einsum, (IN, 3, OUT), "ni,ijk->njk"), (2, IN), False),
}

PAIRS = {"Block_0/Conv_0": "Block_0/BatchNorm_0", "Dense_0": "plain"}


@pytest.fixture
def network(x64):
    """Return variables with random statistics, and an input."""
    rng = np.random.default_rng(9)

    def random(path, leaf):
        value = rng.normal(size=leaf.shape)
        return jnp.asarray(value**2 if path[-1].key == "var" else value)

    x = jnp.asarray(rng.normal(size=(2, 5, 5, IN)))
    return jax.tree_util.tree_map_with_path(random, shapes(Network(), x)), x


# Three layers of sums of up to 36 products, in float64.
NETWORK_TOLERANCE = 1e-11


def assert_near(got, expected):
    tolerance = NETWORK_TOLERANCE * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


class TestFoldLinen:
    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize(
        "pairs",
        [
            PAIRS,
            list(PAIRS.items()),
            [(tuple(a.split("/")), b.split("/")) for a, b in PAIRS.items()],
        ],
        ids=["mapping", "list", "paths as sequences"],
    )
    def test_the_model_without_norms_computes_the_same(self, network, pairs, frozen):
        variables, x = network
        given = freeze(variables) if frozen else variables
        before = jax.tree.map(np.array, variables)
        folded = fold_linen(given, pairs, epsilon=EPSILON)
        assert_equal(variables, before)

        without = Network(norm=False, use_bias=True)
        expected = Network().apply(variables, x)
        assert_near(without.apply(folded, x), expected)
        assert type(folded) is type(folded["params"]["Block_0"]) is dict
        # No entry is missing or left over.
        fresh = shapes(without, x)
        assert jax.tree.structure(folded) == jax.tree.structure(fresh)
        assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, fresh)

    def test_layers_with_biases(self, network):
        variables, x = network
        for path in PAIRS:
            layer = variables["params"]
            for key in path.split("/"):
                layer = layer[key]
            layer["bias"] = jnp.arange(1.0, 1 + layer["kernel"].shape[-1])
        folded = fold_linen(variables, PAIRS, epsilon=EPSILON)
        expected = Network(use_bias=True).apply(variables, x)
        got = Network(norm=False, use_bias=True).apply(folded, x)
        assert_near(got, expected)

    def test_the_comparison_can_fail(self, network):
        variables, x = network
        folded = fold_linen(variables, PAIRS, epsilon=1.01 * EPSILON)
        expected = np.asarray(Network().apply(variables, x))
        got = np.asarray(Network(norm=False, use_bias=True).apply(folded, x))
        assert np.abs(got - expected).max() > 1e3 * NETWORK_TOLERANCE * np.abs(expected).max()

    def test_norms_of_different_epsilons_in_several_calls(self, network):
        variables, _ = network
        both = fold_linen(variables, PAIRS, epsilon=EPSILON)
        one_by_one = variables
        for pair in PAIRS.items():
            one_by_one = fold_linen(one_by_one, iter([pair]), epsilon=EPSILON)
        assert_equal(both, one_by_one)

    def test_no_pairs_change_nothing(self, network):
        variables, _ = network
        assert_equal(fold_linen(variables, {}), variables)

    def test_other_collections_are_kept_and_empty_ones_removed(self):
        params, state = lively_norm("float32")
        variables = {
            "params": {"Dense_0": {"kernel": jnp.ones((IN, OUT))}, "norm": params},
            "batch_stats": {"norm": state},
            "cache": {"index": jnp.ones(3)},
        }
        folded = fold_linen(variables, {"Dense_0": "norm"})
        assert jax.tree.map(jnp.shape, folded) == {
            "params": {"Dense_0": {"kernel": (IN, OUT), "bias": (OUT,)}},
            "cache": {"index": (3,)},
        }

    def test_jit_and_vmap(self, network):
        variables, _ = network
        expected = fold_linen(variables, PAIRS)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), variables)
        got = jax.jit(jax.vmap(lambda v: fold_linen(v, PAIRS)))(stacked)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-12), got, expected)

    @pytest.mark.parametrize("use_bias", [True, False])
    def test_boxes_are_kept(self, x64, rng, use_bias):
        """A box says how an array is partitioned, which folding does not change."""
        ones = nn.initializers.ones
        dense = partial(
            nn.Dense,
            OUT,
            kernel_init=nn.with_partitioning(ones, (None, "model")),
            bias_init=nn.with_logical_partitioning(ones, ("embed",)),
        )
        norm = jaxbn.linen.BatchNorm(
            True, name="norm", scale_init=nn.with_partitioning(ones, ("model",))
        )
        x = jnp.asarray(rng.normal(size=(5, IN)))
        model = Then(partial(dense, use_bias=use_bias), norm)
        variables = model.init(jax.random.key(0), x)
        variables = jax.tree.map(lambda v: jnp.asarray(rng.uniform(1, 2, v.shape)), variables)
        before = jax.tree.map(np.array, variables)
        folded = fold_linen(variables, {"Dense_0": "norm"})
        assert_equal(variables, before)

        got = folded["params"]["Dense_0"]
        assert_equal(
            nn.meta.unbox(folded), fold_linen(nn.meta.unbox(variables), {"Dense_0": "norm"})
        )
        assert type(got["kernel"]) is nn.Partitioned and got["kernel"].names == (None, "model")
        if use_bias:
            assert type(got["bias"]) is nn.LogicallyPartitioned and got["bias"].names == ("embed",)
        else:
            assert isinstance(got["bias"], jax.Array)
        expected = model.apply(variables, x)
        assert_near(Then(dense, None).apply(folded, x), expected)

    @pytest.mark.parametrize("use_bias", [True, False])
    @pytest.mark.parametrize("name", MANY_BIASES)
    def test_biases_of_more_axes(self, x64, rng, name, use_bias):
        """Each feature has several biases, with one mean, variance, scale and bias of the norm."""
        make, shape, is_known = MANY_BIASES[name]

        def model(norm, use_bias):
            last = jaxbn.linen.BatchNorm(True, epsilon=EPSILON, name="norm")
            return Then(make(use_bias=use_bias), last if norm else None)

        x = jnp.asarray(rng.normal(size=shape))
        variables = model(True, use_bias).init(jax.random.key(0), x)
        variables = jax.tree.map(lambda v: jnp.asarray(rng.uniform(1, 2, v.shape)), variables)
        (layer,) = variables["params"].keys() - {"norm"}
        pairs = {layer: "norm"}
        wanted = shapes(model(False, True), x)["params"]
        given = variables
        if not use_bias and not is_known:
            with pytest.raises(ValueError) as raised:
                fold_linen(variables, pairs, epsilon=EPSILON)
            assert str(raised.value) == (
                f"{layer} and norm cannot be folded: the layer has no bias, and its kernel of "
                f"shape {wanted[layer]['kernel'].shape} does not determine the shape of one. Put a "
                "bias of zeros into its params, of the shape that the layer has with "
                "use_bias=True, and fold that."
            )
            bias = jnp.zeros(wanted[layer]["bias"].shape)
            entries = variables["params"][layer] | {"bias": bias}
            given = variables | {"params": variables["params"] | {layer: entries}}
        folded = fold_linen(given, pairs, epsilon=EPSILON)
        assert jax.tree.map(jnp.shape, folded["params"]) == jax.tree.map(jnp.shape, wanted)
        expected = model(True, use_bias).apply(variables, x)
        got = model(False, True).apply(folded, x)
        assert_near(got, expected)

    def test_axis(self):
        params, state = lively_norm("float32")
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, OUT, IN)))
        variables = {"params": {"up": {"kernel": kernel}, "bn": params}, "batch_stats": {}}
        variables["batch_stats"]["bn"] = state
        folded = fold_linen(variables, {"up": "bn"}, axis=-2)["params"]["up"]
        assert_equal(tuple(folded.values()), fold(kernel, None, params, state, axis=-2))

    @pytest.mark.parametrize(
        "pairs, message",
        [
            (
                {"Conv_7": "plain", "Dense_0/kernel": "Block_0/BatchNorm_0"},
                "pairs names layers without a kernel in params: Conv_7, Dense_0/kernel; those with "
                "one are Block_0/Conv_0, Dense_0.",
            ),
            (
                {"Dense_0": "BatchNorm_5"},
                "pairs names batch norms without a mean in batch_stats: BatchNorm_5; those with "
                "one are BatchNorm_0, Block_0/BatchNorm_0, plain.",
            ),
            (
                [("Dense_0", "plain"), ("Dense_0", "BatchNorm_0")],
                "pairs names layers more than once: Dense_0.",
            ),
            (
                {"Dense_0": "plain", "Block_0/Conv_0": "plain"},
                "pairs names batch norms more than once: plain.",
            ),
            (
                ("Dense_0", "plain"),
                "pairs must be a mapping such as {'Conv_0': 'BatchNorm_0'}, or a sequence of pairs "
                "of paths, got ('Dense_0', 'plain').",
            ),
            (
                {"Dense_0": 3},
                "pairs must hold paths like 'Block_0/Conv_0' or ('Block_0', 'Conv_0'), got 3.",
            ),
            (
                {"Dense_0": ()},
                "pairs must hold paths like 'Block_0/Conv_0' or ('Block_0', 'Conv_0'), got ().",
            ),
            (
                {"Dense_0": "BatchNorm_0"},
                "Dense_0 and BatchNorm_0 cannot be folded: params['bias'] must have the shape "
                "(3,), or one that broadcasts like (1, 3), for the 3 features on axis 1 of the "
                "kernel, which has the shape (8, 3); got (8,). If its features are on another "
                "axis, pass that.",
            ),
        ],
    )
    def test_message(self, network, pairs, message):
        with pytest.raises(ValueError) as raised:
            fold_linen(network[0], pairs)
        assert str(raised.value) == message

    @pytest.mark.parametrize("variables, got", [({"params": {}}, "['params']"), ({}, "[]")])
    def test_variables_without_a_collection(self, variables, got):
        with pytest.raises(ValueError) as raised:
            fold_linen(variables, {})
        assert str(raised.value) == (
            f"model_variables must have the collections 'params' and 'batch_stats', got {got}."
        )

    def test_no_mapping(self):
        with pytest.raises(TypeError) as raised:
            fold_linen(None, {})
        assert str(raised.value) == "model_variables must be a mapping, got NoneType."
