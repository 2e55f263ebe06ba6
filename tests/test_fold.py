"""`fold`: the folded layer alone computes what the layer and the batch norm compute."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from jaxbn.inference import fold
from tests.close import assert_equal
from tests.folding import (
    EPSILON,
    IN,
    LAYERS,
    OUT,
    apply,
    layer_then_norm,
    lively_norm,
    of_layer,
    unit_roundoff,
)


@pytest.fixture(params=LAYERS)
def case(request):
    return LAYERS[request.param]


def truth(kernel, bias, params, state, epsilon=EPSILON, axis=-1):
    """Return kernel and bias in extended precision, and the sum of the bias's absolute terms."""
    long = partial(np.asarray, dtype=np.longdouble)
    mean, var = long(state["mean"]), long(state["var"])
    slope = long(params.get("scale", 1)) / np.sqrt(var + np.longdouble(epsilon))
    shift = long(params.get("bias", 0))
    centred = (0 if bias is None else long(bias)) - mean
    new_kernel = np.moveaxis(np.moveaxis(long(kernel), axis, -1) * slope, -1, axis)
    return new_kernel, centred * slope + shift, np.abs(centred * slope) + np.abs(shift)


def assert_same_function(case, dtype, use_bias, epsilon=EPSILON):
    """Compare within the rounding of a sum of n products, and of ten operations on it."""
    layer, shape, axis = case
    x, kernel, bias = of_layer(layer, shape, use_bias, dtype)
    norm = lively_norm(dtype)

    # Compiled as one function, because single operations take seconds.
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
def test_the_folded_layer_computes_what_both_did(x64, case, dtype, use_bias):
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
    """Return a PyTorch layer, what `fold` takes, an input, and the output of layer and norm."""
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
def test_dtypes_are_kept_and_results_rounded_once(x64, dtype, use_bias):
    layer, shape, _ = LAYERS["2d, zero padding"]
    _, kernel, bias = of_layer(layer, shape, use_bias, dtype)
    statistics = "float64" if dtype == "float64" else "float32"
    # With this epsilon, dividing by the root of a variance of zero stays in float16's range.
    params, state = lively_norm(statistics)
    got = fold(kernel, bias, params, state, epsilon=EPSILON)
    assert [v.dtype for v in got] == [dtype, dtype]

    *expected, parts = truth(kernel, bias, params, state)
    narrow, wide = unit_roundoff(dtype), unit_roundoff(statistics)
    # Five roundings, of which a square root halves one and a product adds one; then the dtype's.
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
    """The output may have its features on another axis than the kernel."""
    kernel, bias = (jnp.asarray(rng.normal(size=s)) for s in ((OUT, IN, 3, 3), (OUT,)))
    flat = lively_norm("float32")
    broadcast = lively_norm("float32", keepdims=(1, 1))
    broadcast = jax.tree.map(lambda v: v[None], broadcast)
    assert broadcast[1]["mean"].shape == (1, OUT, 1, 1)
    assert_equal(fold(kernel, bias, *broadcast, axis=0), fold(kernel, bias, *flat, axis=0))
    _, column = fold(kernel, bias.reshape(-1, 1, 1), *flat, axis=0)
    assert column.shape == (OUT, 1, 1)


def test_a_count_in_the_state_is_ignored():
    params, state = lively_norm("float32")
    counted = state | {"count": jnp.zeros((), jnp.int32)}
    kernel = jnp.ones((IN, OUT))
    assert_equal(fold(kernel, None, params, counted), fold(kernel, None, params, state))


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
