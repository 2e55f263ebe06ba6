"""Folding: the layer alone does what the layer and the batch norm did, for every kind of layer."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.core import freeze

import jaxbn
import jaxbn.linen
from jaxbn.inference import fold, fold_linen

IN, OUT, EPSILON = 4, 8, 1e-3
HIGHEST = jax.lax.Precision.HIGHEST
conv = partial(nn.Conv, OUT, (3, 3), precision=HIGHEST)
transposed = partial(nn.ConvTranspose, OUT, (3, 3), precision=HIGHEST)

# The layer, the shape of its input, and where its kernel has the output features.
LAYERS = {
    "dense": (partial(nn.Dense, OUT, precision=HIGHEST), (5, IN), -1),
    "dense on sequences": (partial(nn.Dense, OUT, precision=HIGHEST), (2, 3, IN), -1),
    "1d": (partial(nn.Conv, OUT, (3,), precision=HIGHEST), (2, 7, IN), -1),
    "2d, zero padding": (partial(conv, padding="SAME"), (2, 6, 5, IN), -1),
    "2d, no padding": (partial(conv, padding="VALID"), (2, 6, 5, IN), -1),
    "2d, strides": (partial(conv, strides=(2, 1)), (2, 6, 5, IN), -1),
    "2d, dilation": (partial(conv, kernel_dilation=2), (2, 6, 5, IN), -1),
    "3d": (partial(nn.Conv, OUT, (2, 2, 2), precision=HIGHEST), (2, 3, 4, 3, IN), -1),
    "grouped": (partial(conv, feature_group_count=2), (2, 6, 5, IN), -1),
    "depthwise": (partial(conv, feature_group_count=IN), (2, 6, 5, IN), -1),
    "transposed": (partial(transposed, strides=(2, 2)), (2, 4, 3, IN), -1),
    "transposed, transposed kernel": (
        partial(transposed, strides=(2, 2), transpose_kernel=True),
        (2, 4, 3, IN),
        -2,
    ),
}


@pytest.fixture(params=LAYERS)
def case(request):
    return LAYERS[request.param]


def lively_norm(dtype, features=OUT, keepdims=()):
    """Parameters and statistics that nothing small or close to one hides in."""
    rng = np.random.default_rng(5)
    scale = rng.normal(size=features)
    scale[0], scale[1] = 0, -3
    var = 10 ** rng.uniform(-6, 6, size=features)
    var[2] = 0
    mean = 100 * rng.normal(size=features)
    leaves = (scale, rng.normal(size=features), mean, var)
    scale, bias, mean, var = (jnp.asarray(v.reshape(-1, *keepdims), dtype) for v in leaves)
    return {"scale": scale, "bias": bias}, {"mean": mean, "var": var}


def truth(kernel, bias, params, state, epsilon=EPSILON, axis=-1):
    """Kernel and bias in extended precision; then the sum of what the bias is the sum of."""
    long = partial(np.asarray, dtype=np.longdouble)
    mean, var = long(state["mean"]), long(state["var"])
    slope = long(params.get("scale", 1)) / np.sqrt(var + np.longdouble(epsilon))
    shift = long(params.get("bias", 0))
    centred = (0 if bias is None else long(bias)) - mean
    new_kernel = np.moveaxis(np.moveaxis(long(kernel), axis, -1) * slope, -1, axis)
    return new_kernel, centred * slope + shift, np.abs(centred * slope) + np.abs(shift)


def unit_roundoff(dtype):
    return float(jnp.finfo(dtype).eps) / 2


def layer_then_norm(layer, kernel, bias, params, state, x):
    y = apply(layer, kernel, bias, x)
    return jaxbn.batch_norm(params, state, y, False, epsilon=EPSILON)[0]


def apply(layer, kernel, bias, x):
    params = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    module = layer(use_bias=bias is not None, dtype=x.dtype, param_dtype=x.dtype)
    return module.apply({"params": params}, x)


def of_layer(layer, shape, use_bias, dtype):
    """An input, a kernel and a bias."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    params = shapes(layer(use_bias=use_bias), x)["params"]
    values = {k: jnp.asarray(rng.normal(size=v.shape), dtype) for k, v in params.items()}
    return x, values["kernel"], values.get("bias")


def assert_same_function(case, dtype, use_bias, epsilon=EPSILON):
    """Both within what a sum of n products, and ten operations on it, can be rounded by."""
    layer, shape, axis = case
    x, kernel, bias = of_layer(layer, shape, use_bias, dtype)
    norm = lively_norm(dtype)

    # Compiled as one: op by op, a layer takes seconds.
    @jax.jit
    def outputs(x, kernel, bias, params, state):
        expected = layer_then_norm(layer, kernel, bias, params, state, x)
        new_kernel, new_bias = fold(kernel, bias, params, state, epsilon=epsilon, axis=axis)
        slope = jnp.abs(params["scale"]) / jnp.sqrt(state["var"] + EPSILON)
        constants = slope * (jnp.abs(state["mean"]) + (0 if bias is None else jnp.abs(bias)))
        constants += jnp.abs(params["bias"])
        magnitude = apply(layer, jnp.abs(new_kernel), constants, jnp.abs(x))
        return expected, apply(layer, new_kernel, new_bias, x), magnitude

    expected, got, magnitude = outputs(x, kernel, bias, *norm)
    products = kernel.size // OUT
    tolerance = (2 * products + 10) * unit_roundoff(dtype) * magnitude
    assert got.dtype == expected.dtype == dtype
    assert np.all(np.abs(got - expected) <= tolerance)


@pytest.mark.parametrize("dtype, use_bias", [("float32", True), ("float64", False)])
def test_the_folded_layer_does_what_both_did(x64, case, dtype, use_bias):
    assert_same_function(case, dtype, use_bias)


@pytest.mark.parametrize("name", ["dense", "grouped", "transposed, transposed kernel"])
def test_the_comparison_can_fail(name):
    with pytest.raises(AssertionError):
        assert_same_function(LAYERS[name], "float32", True, epsilon=2 * EPSILON)


TORCH_LAYERS = {
    "linear": (partial(torch.nn.Linear, IN, OUT), (5, IN), 0),
    "conv1d": (partial(torch.nn.Conv1d, IN, OUT, 3), (2, IN, 7), 0),
    "conv2d, OIHW": (partial(torch.nn.Conv2d, IN, OUT, 3, padding=1, stride=2), (2, IN, 6, 5), 0),
    "grouped": (partial(torch.nn.Conv2d, IN, OUT, 3, groups=2), (2, IN, 6, 5), 0),
    "depthwise": (partial(torch.nn.Conv2d, IN, OUT, 3, groups=IN), (2, IN, 6, 5), 0),
    "transposed": (partial(torch.nn.ConvTranspose2d, IN, OUT, 3, stride=2), (2, IN, 4, 3), 1),
}
# Sums of some hundred numbers of up to 1e5: eps = 1e-16 leaves two orders to spare.
TORCH_TOLERANCE = 1e-9


def torch_pair(layer, shape, use_bias):
    """PyTorch's layer and batch norm, an input, and what the two make of it."""
    layer = layer(bias=use_bias, dtype=torch.float64)
    dimensions = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d}
    norm = dimensions[len(shape)](OUT, eps=EPSILON, dtype=torch.float64).eval()
    params, state = lively_norm("float64")
    for ours, theirs in zip(
        (*params.values(), *state.values()),
        (norm.weight, norm.bias, norm.running_mean, norm.running_var),
        strict=True,
    ):
        theirs.data = torch.tensor(np.asarray(ours))
    x = torch.tensor(np.random.default_rng(7).normal(size=shape))
    kernel, bias = layer.weight.detach().numpy(), None
    if use_bias:
        bias = layer.bias.detach().numpy()
    return layer, kernel, bias, params, state, x, norm(layer(x)).detach().numpy()


def torch_folded(layer, kernel, bias, x):
    layer.weight.data = torch.tensor(np.asarray(kernel))
    layer.bias = torch.nn.Parameter(torch.tensor(np.asarray(bias)))
    return layer(x).detach().numpy()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_layers_of_torch(x64, name, use_bias):
    build, shape, axis = TORCH_LAYERS[name]
    layer, kernel, bias, params, state, x, expected = torch_pair(build, shape, use_bias)
    folded = fold(kernel, bias, params, state, epsilon=EPSILON, axis=axis)
    got = torch_folded(layer, *folded, x)
    assert np.abs(got - expected).max() <= TORCH_TOLERANCE * np.abs(expected).max()
    assert np.abs(expected).max() > 1


@pytest.mark.parametrize("use_bias", [True, False])
def test_grouped_transposed_convolution_of_torch_by_vmap(x64, use_bias):
    groups = 2
    build = partial(torch.nn.ConvTranspose2d, IN, OUT, 3, stride=2, groups=groups)
    layer, kernel, bias, params, state, x, expected = torch_pair(build, (2, IN, 4, 3), use_bias)
    arguments = (kernel, bias, params, state)
    with pytest.raises(ValueError, match="4 features on axis 1 of the kernel"):
        fold(*arguments, axis=1)

    by_group = jax.tree.map(lambda v: v.reshape(groups, -1, *v.shape[1:]), arguments)
    new_kernel, new_bias = jax.vmap(partial(fold, epsilon=EPSILON, axis=1))(*by_group)
    got = torch_folded(layer, new_kernel.reshape(kernel.shape), new_bias.reshape(-1), x)
    assert np.abs(got - expected).max() <= TORCH_TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_dtypes_are_kept_and_values_rounded_once_more(x64, dtype, use_bias):
    layer, shape, _ = LAYERS["2d, zero padding"]
    _, kernel, bias = of_layer(layer, shape, use_bias, dtype)
    statistics = "float64" if dtype == "float64" else "float32"
    # A variance of zero, over the square root of epsilon, leaves float16 its range.
    params, state = lively_norm(statistics)
    got = fold(kernel, bias, params, state, epsilon=EPSILON)
    assert [v.dtype for v in got] == [dtype, dtype]

    *expected, parts = truth(kernel, bias, params, state)
    narrow, wide = unit_roundoff(dtype), unit_roundoff(statistics)
    # Five roundings, of which a square root halves one and a product adds one, then the dtype's.
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    for value, exact, magnitude in zip(got, expected, (np.abs(expected[0]), parts), strict=True):
        bound = (6 * wide + narrow * (1 + 6 * wide)) * magnitude + smallest
        assert np.all(np.abs(np.asarray(value, np.longdouble) - exact) <= bound)


def test_the_bias_keeps_its_own_dtype():
    params, state = lively_norm("float32")
    kernel, bias = jnp.ones((IN, OUT), jnp.bfloat16), jnp.ones(OUT, jnp.float32)
    new_kernel, new_bias = fold(kernel, bias, params, state)
    assert (new_kernel.dtype, new_bias.dtype) == (jnp.bfloat16, jnp.float32)


def test_float64_statistics_of_numpy_without_x64():
    params, state = jax.tree.map(lambda v: np.asarray(v, np.float64), lively_norm("float32"))
    kernel, bias = fold(np.ones((IN, OUT)), None, params, state)
    assert kernel.dtype == bias.dtype == jnp.float32


@pytest.mark.parametrize("keys", [(), ("scale",), ("bias",)])
def test_missing_parameters(x64, keys):
    layer, shape, _ = LAYERS["dense"]
    x, kernel, bias = of_layer(layer, shape, True, "float64")
    params, state = lively_norm("float64")
    params = {key: params[key] for key in keys}
    expected = layer_then_norm(layer, kernel, bias, params, state, x)
    got = apply(layer, *fold(kernel, bias, params, state, epsilon=EPSILON), x)
    np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11 * np.abs(expected).max())


def test_leaves_that_broadcast_against_the_output(rng):
    """Which has its features elsewhere than the kernel."""
    kernel, bias = (jnp.asarray(rng.normal(size=s)) for s in ((OUT, IN, 3, 3), (OUT,)))
    flat = lively_norm("float32")
    broadcast = lively_norm("float32", keepdims=(1, 1))
    broadcast = jax.tree.map(lambda v: v[None], broadcast)
    assert broadcast[1]["mean"].shape == (1, OUT, 1, 1)
    assert_same(fold(kernel, bias, *broadcast, axis=0), fold(kernel, bias, *flat, axis=0))
    _, column = fold(kernel, bias.reshape(-1, 1, 1), *flat, axis=0)
    assert column.shape == (OUT, 1, 1)


def test_a_count_in_the_state_does_not_matter():
    params, state = lively_norm("float32")
    counted = state | {"count": jnp.zeros((), jnp.int32)}
    kernel = jnp.ones((IN, OUT))
    assert_same(fold(kernel, None, params, counted), fold(kernel, None, params, state))


def test_jit_and_vmap(x64, rng):
    ensemble = 3
    kernel = jnp.asarray(rng.normal(size=(ensemble, 3, 3, IN, OUT)))
    bias = jnp.asarray(rng.normal(size=(ensemble, OUT)))
    norm = jax.tree.map(lambda v: jnp.stack([v, 2 * v, v + 1]), lively_norm("float64"))
    got = jax.jit(jax.vmap(fold))(kernel, bias, *norm)
    for k in range(ensemble):
        alone = fold(kernel[k], bias[k], *jax.tree.map(lambda v, k=k: v[k], norm))
        for a, b in zip(got, alone, strict=True):
            # Compilers contract a product and a sum.
            np.testing.assert_allclose(a[k], b, rtol=1e-12, atol=1e-12)


def test_traced_epsilon():
    arguments = (jnp.ones((IN, OUT)), None, *lively_norm("float32"))
    got = jax.jit(lambda epsilon: fold(*arguments, epsilon=epsilon))(EPSILON)
    for a, b in zip(got, fold(*arguments, epsilon=EPSILON), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("name", ["dense", "2d, zero padding", "transposed, transposed kernel"])
def test_gradients_are_those_of_both(x64, name):
    layer, shape, axis = LAYERS[name]
    x, kernel, bias = of_layer(layer, shape, True, "float64")
    params, state = lively_norm("float64")
    # The gradient with respect to a variance of zero would hide the others.
    state["var"] = state["var"].at[2].set(1e-2)

    def of_both(*arguments):
        return jnp.sum(jnp.sin(layer_then_norm(layer, *arguments, x)))

    def of_folded(*arguments):
        return jnp.sum(jnp.sin(apply(layer, *fold(*arguments, epsilon=EPSILON, axis=axis), x)))

    gradients = (
        jax.tree.leaves(jax.jit(jax.grad(f, (0, 1, 2, 3)))(kernel, bias, params, state))
        for f in (of_both, of_folded)
    )
    for a, b in zip(*gradients, strict=True):
        assert np.abs(a).max() > 0
        # Outputs of up to 1e5 are rounded by 1e-11, which their sines and cosines pass on.
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.abs(a).max())


@pytest.mark.parametrize("mode", ["standard", "strict"])
def test_strict_promotion(mode):
    params, state = lively_norm("float32")
    with jax.numpy_dtype_promotion(mode), jax.numpy_rank_promotion("raise"):
        for params_or_less in (params, {}):
            kernel = jnp.ones((3, 3, IN, OUT), jnp.bfloat16)
            assert fold(kernel, None, params_or_less, state)[0].dtype == jnp.bfloat16


class TestFoldErrors:
    GOOD = (jnp.ones((3, 3, IN, OUT)), jnp.ones(OUT), *jaxbn.init((2, OUT)))

    @pytest.mark.parametrize(
        "changes, options, error, message",
        [
            (
                {0: jnp.ones((IN, OUT), int)},
                {},
                TypeError,
                "kernel must be of a floating dtype, got int32; convert it, for instance with "
                "kernel.astype(jnp.float32).",
            ),
            (
                {1: jnp.ones(OUT, int)},
                {},
                TypeError,
                "bias must be an array of a floating dtype, got int32.",
            ),
            (
                {1: jnp.ones(3)},
                {},
                ValueError,
                "bias must have the shape (8,), or one that broadcasts like (1, 8), for the 8 "
                "features on axis 3 of the kernel, which has the shape (3, 3, 4, 8); got (3,). If "
                "axis is another one, pass it.",
            ),
            (
                {1: None},
                {"axis": 0},
                ValueError,
                "params['scale'] must have the shape (3,), or one that broadcasts like (1, 3), for "
                "the 3 features on axis 0 of the kernel, which has the shape (3, 3, 4, 8); got "
                "(8,). If axis is another one, pass it.",
            ),
            (
                {},
                {"axis": 4},
                ValueError,
                "axis=4 is out of range for the shape (3, 3, 4, 8): an axis must lie in [-4, 3].",
            ),
            (
                {},
                {"axis": (2, 3)},
                ValueError,
                "axis must be one axis, that of the kernel's features, got (2, 3).",
            ),
            (
                {},
                {"epsilon": -1e-5},
                ValueError,
                "epsilon must be a finite number, not negative, got -1e-05.",
            ),
            ({2: None}, {}, ValueError, "params must be a mapping, got NoneType."),
            (
                {2: {"gamma": jnp.ones(OUT)}},
                {},
                ValueError,
                "params may have the keys ['bias', 'scale']; got ['gamma'].",
            ),
            (
                {2: {"scale": jnp.ones(OUT, int)}},
                {},
                TypeError,
                "params['scale'] must be an array of a floating dtype, got int32.",
            ),
            (
                {3: None},
                {},
                ValueError,
                "state must be a mapping with 'mean' and 'var', got None: a batch norm without "
                "running statistics differs from batch to batch, which no kernel does.",
            ),
            ({3: [1]}, {}, ValueError, "state must be a mapping, got list."),
            (
                {3: {"mean": jnp.ones(OUT)}},
                {},
                ValueError,
                "state must have the keys ['mean', 'var'] and may have the keys ['count']; got "
                "['mean'].",
            ),
            (
                {3: {"mean": jnp.ones(OUT), "var": [1.0] * OUT}},
                {},
                TypeError,
                "state['var'] must be an array of a floating dtype, got list.",
            ),
            (
                {3: {"mean": jnp.ones((OUT, OUT)), "var": jnp.ones(OUT)}},
                {},
                ValueError,
                "state['mean'] must have the shape (8,), or one that broadcasts like (1, 8), for "
                "the 8 features on axis 3 of the kernel, which has the shape (3, 3, 4, 8); got "
                "(8, 8). If axis is another one, pass it.",
            ),
            (
                {0: nn.Partitioned(jnp.ones((IN, OUT)), (None, "model"))},
                {},
                TypeError,
                "kernel must be an array, got a box of Flax's, Partitioned: pass "
                "flax.linen.meta.unbox(kernel), or fold the model's variables with fold_linen.",
            ),
            (
                {1: jnp.ones((IN, 3, OUT))},
                {},
                ValueError,
                "bias must have the shape (8,), or one that broadcasts like (1, 8), for the 8 "
                "features on axis 3 of the kernel, which has the shape (3, 3, 4, 8); got "
                "(4, 3, 8). If axis is another one, pass it.",
            ),
            *(
                (
                    {3: {"mean": jnp.ones(OUT), "var": var}},
                    {},
                    ValueError,
                    "state['var'] must hold variances, none of them negative or NaN, got "
                    f"{text} for feature 2. Where rounding made it negative, clip it: "
                    "jnp.maximum(state['var'], 0).",
                )
                for var, text in (
                    (jnp.ones(OUT).at[2].set(-1e-9), "-1e-09"),
                    (np.array([1, 1, -3.5] + [1] * 5)[None], "-3.5"),
                    (jnp.ones((1, OUT), jnp.bfloat16).at[0, 2].set(jnp.nan), "nan"),
                )
            ),
            *(
                (
                    {3: {"mean": jnp.ones(OUT), "var": np.ones(OUT) - np.eye(OUT)[3]}},
                    {"epsilon": epsilon},
                    ValueError,
                    f"state['var'] must be positive where epsilon={epsilon!r}, got 0 for feature "
                    "3, which would be divided by zero. Pass the epsilon of the batch norm.",
                )
                # The second is no normal number of float32.
                for epsilon in (0.0, 1e-40)
            ),
        ],
    )
    def test_message(self, changes, options, error, message):
        arguments = [changes.get(k, good) for k, good in enumerate(self.GOOD)]
        with pytest.raises(error) as raised:
            fold(*arguments, **options)
        assert str(raised.value) == message


def test_a_variance_of_zero_has_an_epsilon(x64):
    """Zero is a variance, and float64 has an epsilon that float32 has not."""
    params, state = lively_norm("float64")
    assert state["var"][2] == 0
    _, bias = fold(jnp.ones((IN, OUT)), None, params, state, epsilon=1e-40)
    expected = params["bias"][2] - 1e20 * params["scale"][2] * state["mean"][2]
    np.testing.assert_allclose(bias[2], expected, rtol=1e-12)


def test_traced_variances_are_not_looked_at():
    def slope(var, epsilon):
        state = {"mean": jnp.zeros(OUT), "var": var}
        return fold(jnp.ones((IN, OUT)), None, {}, state, epsilon=epsilon)[0][0]

    values = jnp.ones(OUT).at[2].set(-1)
    assert list(np.isnan(jax.jit(slope)(values, 0.0))) == [k == 2 for k in range(OUT)]
    # Of two arguments, the traced one alone is not known.
    with pytest.raises(ValueError, match="negative or NaN, got -1 for feature 2"):
        jax.jit(partial(slope, values))(1e-5)


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
    """With a norm deep down, one that has no parameters, and one that stays."""

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
    """A layer under the name that Flax gives it, then a norm."""

    layer: Callable[[], nn.Module]
    norm: nn.Module | None

    @nn.compact
    def __call__(self, x):
        y = self.layer()(x)
        return y if self.norm is None else self.norm(y)


# The layer, the shape of its input, and whether the kernel tells the shape of the bias.
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
    """Variables with lively statistics, and an input."""
    rng = np.random.default_rng(9)

    def lively(path, leaf):
        value = rng.normal(size=leaf.shape)
        return jnp.asarray(value**2 if path[-1].key == "var" else value)

    x = jnp.asarray(rng.normal(size=(2, 5, 5, IN)))
    return jax.tree_util.tree_map_with_path(lively, shapes(Network(), x)), x


# Three layers of sums of up to 36 products, in float64.
NETWORK_TOLERANCE = 1e-11


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
    def test_the_model_without_norms_does_the_same(self, network, pairs, frozen):
        variables, x = network
        given = freeze(variables) if frozen else variables
        before = jax.tree.map(np.array, variables)
        folded = fold_linen(given, pairs, epsilon=EPSILON)
        assert_same(variables, before)

        without = Network(norm=False, use_bias=True)
        expected = Network().apply(variables, x)
        np.testing.assert_allclose(
            without.apply(folded, x),
            expected,
            rtol=0,
            atol=NETWORK_TOLERANCE * np.abs(expected).max(),
        )
        assert type(folded) is type(folded["params"]["Block_0"]) is dict
        # Nothing is left over, and nothing is missing.
        fresh = shapes(without, x)
        assert jax.tree.structure(folded) == jax.tree.structure(fresh)
        assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, fresh)

    def test_biases_that_are_there(self, network):
        variables, x = network
        for path in PAIRS:
            layer = variables["params"]
            for key in path.split("/"):
                layer = layer[key]
            layer["bias"] = jnp.arange(1.0, 1 + layer["kernel"].shape[-1])
        folded = fold_linen(variables, PAIRS, epsilon=EPSILON)
        expected = Network(use_bias=True).apply(variables, x)
        got = Network(norm=False, use_bias=True).apply(folded, x)
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=NETWORK_TOLERANCE * np.abs(expected).max()
        )

    def test_a_wrong_epsilon_shows(self, network):
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
        assert_same(both, one_by_one)

    def test_no_pairs_change_nothing(self, network):
        variables, _ = network
        assert_same(fold_linen(variables, {}), variables)

    def test_other_collections_stay_and_an_empty_one_goes(self):
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
    def test_boxes_stay(self, x64, rng, use_bias):
        """A box tells how an array lies on a mesh, which folding does not change."""
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
        assert_same(variables, before)

        got = folded["params"]["Dense_0"]
        assert_same(
            nn.meta.unbox(folded), fold_linen(nn.meta.unbox(variables), {"Dense_0": "norm"})
        )
        assert type(got["kernel"]) is nn.Partitioned and got["kernel"].names == (None, "model")
        if use_bias:
            assert type(got["bias"]) is nn.LogicallyPartitioned and got["bias"].names == ("embed",)
        else:
            assert isinstance(got["bias"], jax.Array)
        expected = model.apply(variables, x)
        np.testing.assert_allclose(
            Then(dense, None).apply(folded, x),
            expected,
            rtol=0,
            atol=NETWORK_TOLERANCE * np.abs(expected).max(),
        )

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
                f"shape {wanted[layer]['kernel'].shape} does not tell the shape that its bias "
                "would have. Put a bias of zeros into its params, of the shape that the layer has "
                "with use_bias=True, and fold that."
            )
            bias = jnp.zeros(wanted[layer]["bias"].shape)
            entries = variables["params"][layer] | {"bias": bias}
            given = variables | {"params": variables["params"] | {layer: entries}}
        folded = fold_linen(given, pairs, epsilon=EPSILON)
        assert jax.tree.map(jnp.shape, folded["params"]) == jax.tree.map(jnp.shape, wanted)
        expected = model(True, use_bias).apply(variables, x)
        got = model(False, True).apply(folded, x)
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=NETWORK_TOLERANCE * np.abs(expected).max()
        )

    def test_axis(self):
        params, state = lively_norm("float32")
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, OUT, IN)))
        variables = {"params": {"up": {"kernel": kernel}, "bn": params}, "batch_stats": {}}
        variables["batch_stats"]["bn"] = state
        folded = fold_linen(variables, {"up": "bn"}, axis=-2)["params"]["up"]
        assert_same(tuple(folded.values()), fold(kernel, None, params, state, axis=-2))

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
                "kernel, which has the shape (8, 3); got (8,). If axis is another one, pass it.",
            ),
        ],
    )
    def test_message(self, network, pairs, message):
        with pytest.raises(ValueError) as raised:
            fold_linen(network[0], pairs)
        assert str(raised.value) == message

    @pytest.mark.parametrize(
        "variables, got", [({"params": {}}, "['params']"), ({}, "[]"), (None, "NoneType")]
    )
    def test_variables_without_a_collection(self, variables, got):
        with pytest.raises(ValueError) as raised:
            fold_linen(variables, {})
        assert str(raised.value) == (
            f"model_variables must have the collections 'params' and 'batch_stats', got {got}."
        )


def shapes(model, x):
    """The model's variables, without their values."""
    return jax.eval_shape(model.init, jax.random.key(0), x)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
