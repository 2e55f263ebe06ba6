"""Parity with PyTorch: equal in float64, and in float32 never further from the truth."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.typing import DTypeLike

import jaxbn
from tests import oracle

# (features on axis 1) for each of PyTorch's layers
SHAPES = {
    "1d (N, C)": (torch.nn.BatchNorm1d, (12, 5)),
    "1d (N, C, L)": (torch.nn.BatchNorm1d, (6, 5, 7)),
    "2d": (torch.nn.BatchNorm2d, (4, 5, 3, 6)),
    "3d": (torch.nn.BatchNorm3d, (3, 5, 2, 3, 4)),
}
STEPS = 4

# Both sum some hundred numbers of order one and divide: eps = 2e-16 leaves three orders to spare.
FLOAT64_TOLERANCE = 1e-10


@pytest.fixture(params=SHAPES)
def case(request):
    return SHAPES[request.param]


def batches(shape, dtype: DTypeLike = np.float64, mean=2.0, std=3.0):
    """Yield `STEPS` pairs of an input and a cotangent, with a different mean each."""
    rng = np.random.default_rng(1)
    for step in range(STEPS):
        x = mean * (1 + step / 4) + std * rng.normal(size=shape)
        yield x.astype(dtype), rng.normal(size=shape).astype(dtype)


def torch_layer(cls, features, **options):
    """Return a PyTorch layer with random parameters."""
    layer = cls(features, **options)
    rng = np.random.default_rng(2)
    for parameter in layer.parameters():
        parameter.data = torch.tensor(rng.normal(size=features), dtype=parameter.dtype)
    return layer


def from_torch(layer, dtype):
    """Return our parameters and state for a PyTorch layer."""
    names = {"weight": "scale", "bias": "bias"}
    params = {
        names[name]: jnp.asarray(p.detach().numpy(), dtype) for name, p in layer.named_parameters()
    }
    if layer.running_mean is None:
        return params, None
    state = {
        "mean": jnp.asarray(layer.running_mean.numpy()),
        "var": jnp.asarray(layer.running_var.numpy()),
        "count": jnp.asarray(layer.num_batches_tracked.numpy(), jnp.int32),
    }
    return params, state


def torch_step(layer, x, dy):
    """Return output and gradients of one step; the layer updates its own statistics."""
    x = torch.tensor(x, requires_grad=True)
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.tensor(dy))
    parameters = [p.grad.numpy() for p in layer.parameters()]
    return [y.detach().numpy(), x.grad.numpy(), *parameters]


def our_step(params, state, x, dy, train, **options):
    """Return the same of ours, and the new state. `scale` comes before `bias`, as in PyTorch."""

    def step(x, params):
        return jaxbn.batch_norm(params, state, x, train, **options)

    y, vjp, state = jax.vjp(step, jnp.asarray(x), params, has_aux=True)
    dx, dparams = vjp(jnp.asarray(dy))
    return [y, dx, *(dparams[k] for k in ("scale", "bias") if k in dparams)], state


compiled_step = jax.jit(our_step, static_argnames=("train", "axis", "momentum", "epsilon"))


def assert_close(ours, theirs, tolerance=FLOAT64_TOLERANCE):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert oracle.error(a, b) <= tolerance


@pytest.mark.parametrize("torch_momentum", [0.0, 0.1, 0.25, 1.0, None])
def test_training_then_evaluation(x64, case, torch_momentum):
    cls, shape = case
    layer = torch_layer(cls, shape[1], momentum=torch_momentum, eps=1e-3, dtype=torch.float64)
    params, state = from_torch(layer, jnp.float64)
    momentum = None if torch_momentum is None else 1 - torch_momentum
    options = {"axis": 1, "momentum": momentum, "epsilon": 1e-3}
    for x, dy in batches(shape):
        ours, state = compiled_step(params, state, x, dy, True, **options)
        assert_close(ours, torch_step(layer, x, dy))
        assert_close([state["mean"], state["var"]], [layer.running_mean, layer.running_var])
        assert state["count"] == layer.num_batches_tracked.item()
    layer.eval()
    for x, dy in batches(shape):
        ours, same = compiled_step(params, state, x, dy, False, **options)
        assert_close(ours, torch_step(layer, x, dy))
        for key in state:
            np.testing.assert_array_equal(same[key], state[key])


def test_channels_last(x64, case):
    cls, shape = case
    layer = torch_layer(cls, shape[1], dtype=torch.float64)
    params, state = from_torch(layer, jnp.float64)
    for x, dy in batches(shape):
        last = [np.moveaxis(v, 1, -1) for v in (x, dy)]
        (y, dx, *dparams), state = compiled_step(params, state, *last, True)
        ours = [np.moveaxis(y, -1, 1), np.moveaxis(dx, -1, 1), *dparams]
        assert_close(ours, torch_step(layer, x, dy))
        assert_close([state["mean"], state["var"]], [layer.running_mean, layer.running_var])


@pytest.mark.parametrize("train", [True, False])
def test_without_affine_parameters(x64, case, train):
    cls, shape = case
    layer = torch_layer(cls, shape[1], affine=False, dtype=torch.float64).train(train)
    params, state = from_torch(layer, jnp.float64)
    assert params == {}
    for x, dy in batches(shape):
        ours, state = compiled_step(params, state, x, dy, train, axis=1)
        assert_close(ours, torch_step(layer, x, dy))
    assert_close([state["mean"], state["var"]], [layer.running_mean, layer.running_var])


@pytest.mark.parametrize("train", [True, False])
def test_without_running_statistics(x64, case, train):
    cls, shape = case
    layer = torch_layer(cls, shape[1], track_running_stats=False, dtype=torch.float64).train(train)
    params, state = from_torch(layer, jnp.float64)
    assert state is None
    for x, dy in batches(shape):
        ours, state = compiled_step(params, state, x, dy, train, axis=1)
        assert state is None
        assert_close(ours, torch_step(layer, x, dy))


@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("train", [True, False])
def test_functional(x64, affine, train):
    shape = (6, 5, 4)
    rng = np.random.default_rng(3)
    weight, bias = (rng.normal(size=5) if given else None for given in affine)
    mean, var = rng.normal(size=5), rng.uniform(0.5, 2, size=5)
    params = {k: jnp.asarray(v) for k, v in [("scale", weight), ("bias", bias)] if v is not None}
    state = {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
    weight, bias, mean, var = (
        None if v is None else torch.tensor(v) for v in (weight, bias, mean, var)
    )
    for x, _ in batches(shape):
        theirs = torch.nn.functional.batch_norm(
            torch.tensor(x), mean, var, weight, bias, train, momentum=0.3, eps=1e-4
        )
        ours, state = jaxbn.batch_norm(
            params, state, jnp.asarray(x), train, axis=1, momentum=0.7, epsilon=1e-4
        )
        assert_close([ours, state["mean"], state["var"]], [theirs, mean, var])


# name: (mean, deviation) of the input
INPUTS = {
    "unit": (0.0, 1.0),
    "mean of 1.5 deviations": (1.5, 1.0),
    "mean of 30 deviations": (3.0, 0.1),
    "mean of 1e4 deviations": (1e4, 1.0),
    "tiny": (0.0, 1e-10),
    "huge": (1e12, 1e10),
}


@pytest.mark.parametrize(
    ("dtype", "inputs"),
    [
        *itertools.product([torch.float32], INPUTS),
        # Half precision cannot tell values 1e4 deviations from zero apart, nor hold 1e12.
        *itertools.product([torch.bfloat16, torch.float16], ["unit", "mean of 30 deviations"]),
    ],
    ids=str,
)
def test_low_precision_is_never_further_from_the_truth(case, dtype, inputs):
    cls, shape = case
    shape = (40 * shape[0], *shape[1:])
    jax_dtype = jnp.dtype(str(dtype).removeprefix("torch."))
    # PyTorch keeps parameters and statistics in float32 beside inputs in half precision.
    layer = torch_layer(cls, shape[1], dtype=torch.float32)
    params, state = from_torch(layer, jnp.float32)
    scale, bias = (np.asarray(params[k]) for k in ("scale", "bias"))
    mean, var = (np.asarray(state[k]).astype(np.longdouble) for k in ("mean", "var"))
    count = np.prod(shape) // shape[1]
    for x, dy in batches(shape, np.float32, *INPUTS[inputs]):
        x, dy = jnp.asarray(x, jax_dtype), jnp.asarray(dy, jax_dtype)
        truth = oracle.batch_norm(x, dy, scale, bias, axis=1)
        mean = 0.9 * mean + 0.1 * truth.mean
        var = 0.9 * var + 0.1 * truth.var * count / (count - 1)
        ours, state = our_step(params, state, x, dy, True, axis=1)
        ours += [state["mean"], state["var"]]
        t = torch.tensor(np.asarray(x, np.float32)).to(dtype).requires_grad_()
        layer.zero_grad()
        y = layer(t)
        y.backward(torch.tensor(np.asarray(dy, np.float32)).to(dtype))
        theirs = [
            y,
            t.grad,
            layer.weight.grad,
            layer.bias.grad,
            layer.running_mean,
            layer.running_var,
        ]
        theirs = [v.detach().double().numpy() for v in theirs]
        truths = [*truth[:4], mean, var]
        # PyTorch's CPU kernels may sum and normalize in float64; ours round in float32, where two
        # things differ by rounding alone. A value of y or dx takes four roundings of eps / 2. A sum
        # is added up in blocks: a dozen partial sums of about its size are rounded by eps / 2.
        value = 2 * float(jnp.finfo(jnp.float32).eps)
        sum_ = 6 * float(jnp.finfo(jnp.float32).eps)
        if dtype != torch.float32:
            value = float(jnp.finfo(jax_dtype).eps)
        roundings = [value, value, sum_, sum_, sum_, sum_]
        names = ["y", "dx", "dscale", "dbias", "mean", "var"]
        for name, a, b, exact, rounding in zip(names, ours, theirs, truths, roundings, strict=True):
            assert oracle.error(a, exact) <= oracle.error(b, exact) + rounding, name
