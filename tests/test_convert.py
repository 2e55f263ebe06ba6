"""Conversion: the frameworks' own layers and ours do the same on both sides of it."""

import os
import subprocess
import sys
from typing import Any

# Keras asks once, when it is imported. Its JAX backend needs no further framework.
os.environ["KERAS_BACKEND"] = "jax"

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import safetensors.torch
import torch

import jaxbn
import jaxbn.linen
from jaxbn import convert
from tests import oracle

# Keras asks NumPy for its own arrays in a way that NumPy is giving up.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

FEATURES = 5
EPSILON = 1e-3
MOMENTUM = 0.9

# Both sum some hundred numbers of order one and divide: eps = 2e-16 leaves three orders to spare.
FLOAT64_TOLERANCE = 1e-10
# Keras computes in float32 whatever comes, outside TensorFlow. A value takes some twelve roundings
# of eps / 2, of terms that are up to three times the largest value.
FLOAT32_TOLERANCE = 12 * 3 * float(jnp.finfo(jnp.float32).eps) / 2

CONSTANT_MOMENTUM = {"axis": 1, "epsilon": EPSILON, "momentum": MOMENTUM}
BIASED = {"batch_variance": "biased", "running_variance": "biased"}

batch_norm = jax.jit(
    jaxbn.batch_norm,
    static_argnums=3,
    static_argnames=("axis", "epsilon", "batch_variance", "running_variance"),
)


def debiasing(options, state):
    """The momentum that makes a plain average follow one without its initial value."""
    if "count" not in state:
        return options
    count = int(state["count"])
    return options | {"momentum": 1 - (1 - MOMENTUM) / (1 - MOMENTUM ** (count + 1))}


class Torch:
    """PyTorch's layer behind the interface that all frameworks have here. Features on axis 1."""

    module = torch.nn.BatchNorm2d
    shape = (4, FEATURES, 3, 6)
    params = (("scale", "bias"), ())
    tolerance = FLOAT64_TOLERANCE

    def __init__(self, params, dtype="float64"):
        self.layer = self.module(
            FEATURES, EPSILON, 1 - MOMENTUM, affine=bool(params), dtype=getattr(torch, dtype)
        )

    def run(self, x, train):
        self.layer.train(train)
        return self.layer(torch.tensor(x)).detach().numpy()

    def ours(self):
        return convert.from_torch(self.layer.state_dict())

    def load(self, params, state):
        self.layer.load_state_dict(convert.to_torch(params, state))

    def options(self, state):
        return CONSTANT_MOMENTUM


class Torch1d(Torch):
    module = torch.nn.BatchNorm1d
    shape = (12, FEATURES)


class Torch3d(Torch):
    module = torch.nn.BatchNorm3d
    shape = (3, FEATURES, 2, 3, 4)


class Keras:
    shape = (4, FEATURES, 3, 6)
    params = (("scale", "bias"), ("scale",), ("bias",), ())
    tolerance = FLOAT32_TOLERANCE

    def __init__(self, params, dtype="float64"):
        self.layer = keras.layers.BatchNormalization(
            1, MOMENTUM, EPSILON, center="bias" in params, scale="scale" in params, dtype=dtype
        )
        self.layer.build(self.shape)

    def run(self, x, train):
        return np.asarray(self.layer(x, training=train))

    def ours(self):
        return convert.from_keras({v.name: v.numpy() for v in self.layer.weights})

    def load(self, params, state):
        self.layer.set_weights(list(convert.to_keras(params, state).values()))

    def options(self, state):
        return CONSTANT_MOMENTUM | BIASED


class Haiku:
    shape = (4, FEATURES, 3, 6)
    params = Keras.params
    tolerance = FLOAT64_TOLERANCE

    def __init__(self, params, dtype="float64"):
        def layer(x, train):
            norm = hk.BatchNorm(
                "scale" in params, "bias" in params, MOMENTUM, EPSILON, data_format="NC..."
            )
            return norm(x, train)

        transformed = hk.transform_with_state(layer)
        self.apply = jax.jit(transformed.apply, static_argnums=4)
        self.variables = transformed.init(None, jnp.ones(self.shape, dtype), True)

    def run(self, x, train):
        params, state = self.variables
        y, state = self.apply(params, state, None, x, train)
        self.variables = params, state
        return y

    def ours(self):
        return convert.from_haiku(*self.variables)

    def load(self, params, state):
        shape = (1, FEATURES, 1, 1)
        self.variables = convert.to_haiku(params, state, momentum=MOMENTUM, shape=shape)

    def options(self, state):
        return debiasing(CONSTANT_MOMENTUM | BIASED, state)


@eqx.filter_jit
def equinox_step(layer, x, state, train):
    def of_example(x, state):
        return layer(x, state, inference=not train)

    mapped = jax.vmap(of_example, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return mapped(x, state)


class Equinox:
    mode = "batch"
    shape = (4, FEATURES, 3, 6)
    params = Torch.params
    tolerance = FLOAT64_TOLERANCE

    def __init__(self, params, dtype="float64"):
        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        self.layer, self.state = make(
            *(FEATURES, "batch", EPSILON, bool(params), MOMENTUM), dtype=dtype, mode=self.mode
        )

    def run(self, x, train):
        y, self.state = equinox_step(self.layer, jnp.asarray(x), self.state, train)
        return y

    def ours(self):
        return convert.from_equinox(self.layer, self.state)

    def load(self, params, state):
        self.layer, self.state = convert.to_equinox(params, state, self.layer, self.state)

    def options(self, state):
        return debiasing(CONSTANT_MOMENTUM | BIASED, state)


class EquinoxEma(Equinox):
    """Its training normalizes with the averages, so that only they can be compared."""

    mode = "ema"

    def options(self, state):
        return CONSTANT_MOMENTUM | BIASED


FRAMEWORKS = [Torch, Torch1d, Torch3d, Keras, Haiku, Equinox, EquinoxEma]
CASES = [
    pytest.param(framework, params, id=f"{framework.__name__}-{'+'.join(params) or 'plain'}")
    for framework in FRAMEWORKS
    for params in framework.params
]


def random_numbers(params, dtype: Any = np.float64, seed=1, count: int | None = 3):
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.normal(size=FEATURES), dtype) for name in params}
    state = {
        "mean": jnp.asarray(rng.normal(size=FEATURES), dtype),
        "var": jnp.asarray(rng.uniform(0.5, 2, size=FEATURES), dtype),
    }
    if count is not None:
        state["count"] = jnp.int32(count)
    return params, state


def batches(shape, seed, number=3):
    rng = np.random.default_rng(seed)
    return [1 + step + 2 * rng.normal(size=shape) for step in range(number)]


def assert_close(a, b, tolerance=FLOAT64_TOLERANCE):
    assert oracle.error(a, b) <= tolerance


def assert_evaluates_alike(theirs, params, state):
    for x in batches(theirs.shape, seed=2):
        y, _ = batch_norm(params, state, x, False, axis=1, epsilon=EPSILON)
        assert_close(y, theirs.run(x, False), theirs.tolerance)


def assert_trains_alike(theirs, params, state):
    """Steps on both sides; returns our state after them."""
    for x in batches(theirs.shape, seed=3):
        y, state = batch_norm(params, state, x, True, **theirs.options(state))
        their_y = theirs.run(x, True)
        if not isinstance(theirs, EquinoxEma):
            assert_close(y, their_y, theirs.tolerance)
        assert_evaluates_alike(theirs, params, state)
    return state


def assert_same(ours, others):
    """The same keys, dtypes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(others)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("framework", "params"), CASES)
def test_theirs_goes_on_as_ours(x64, framework, params, steps):
    theirs = framework(params)
    numbers, state = random_numbers(params)
    theirs.load(numbers, state | {"count": jnp.int32(0)})
    for x in batches(theirs.shape, seed=4, number=steps):
        theirs.run(x, True)
    ours, state = theirs.ours()
    assert_same(ours, {k: v.reshape(ours[k].shape) for k, v in numbers.items()})
    assert_evaluates_alike(theirs, ours, state)
    assert_trains_alike(theirs, ours, state)


@pytest.mark.parametrize("count", [None, 3, 10_000])
@pytest.mark.parametrize(("framework", "params"), CASES)
def test_ours_goes_on_as_theirs(x64, framework, params, count):
    params, state = random_numbers(params, count=count)
    theirs = framework(params)
    theirs.load(params, state)
    assert_evaluates_alike(theirs, params, state)
    state = assert_trains_alike(theirs, params, state)
    _, their_state = theirs.ours()
    for key in ("mean", "var"):
        assert_close(np.ravel(their_state[key]), state[key], theirs.tolerance)


@pytest.mark.parametrize(("framework", "params"), CASES)
def test_a_fresh_layer(x64, framework, params):
    """Whatever a layer begins with, it is converted with."""
    theirs = framework(params)
    ours, state = theirs.ours()
    assert sorted(ours) == sorted(params)
    assert_evaluates_alike(theirs, ours, state)
    if "count" in state:
        assert state["count"] == 0


@pytest.mark.parametrize("swap", [("mean", "var"), ("scale", "bias")])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_comparison_can_fail(x64, framework, swap):
    theirs = framework(("scale", "bias"))
    theirs.load(*random_numbers(("scale", "bias")))
    params, state = theirs.ours()
    other = dict(zip(swap, reversed(swap), strict=True))
    params, state = (
        {name: tree[other.get(name, name)] for name in tree} for tree in (params, state)
    )
    state["var"] = abs(state["var"])
    with pytest.raises(AssertionError):
        assert_evaluates_alike(theirs, params, state)


# Equinox multiplies and divides by the same weight where it counts: two roundings.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize(("framework", "params"), CASES)
def test_there_and_back(x64, framework, params, count, dtype):
    params, state = random_numbers(params, dtype, count=count)
    theirs = framework(params, dtype)
    theirs.load(params, state)
    back = theirs.ours()
    if issubclass(framework, Torch) and count is None:
        state["count"] = jnp.int32(0)
    if framework in (Keras, EquinoxEma):
        state.pop("count", None)
    back = tuple({k: v.reshape(v.size) if v.ndim else v for k, v in tree.items()} for tree in back)
    if framework is Equinox and count is not None:
        for key in ("mean", "var"):
            rounding = float(jnp.finfo(dtype).eps)
            assert oracle.error(back[1][key], state[key]) <= rounding
            back[1][key] = state[key]
    assert_same(back, (params, state))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_back_and_there(framework):
    """Their numbers, after some training in float32, are theirs again."""
    theirs = framework(("scale", "bias"), "float32")
    params, state = random_numbers(("scale", "bias"), "float32")
    theirs.load(params, state)
    for x in batches(theirs.shape, seed=4):
        theirs.run(x.astype(np.float32), True)
    other = framework(("scale", "bias"), "float32")
    other.load(*theirs.ours())
    if issubclass(framework, Torch):
        a, b = theirs.layer.state_dict(), other.layer.state_dict()
        assert list(a) == list(b)
        assert all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
    elif framework is Keras:
        assert_same(theirs.layer.get_weights(), other.layer.get_weights())
    elif framework is Haiku:
        hidden = [
            [average.pop("hidden") for average in layer.variables[1].values()]
            for layer in (theirs, other)
        ]
        assert_same(theirs.variables, other.variables)
        # Divided and multiplied by the same weight: two roundings.
        for a, b in zip(*hidden, strict=True):
            assert oracle.error(b, a) <= float(jnp.finfo(jnp.float32).eps)
    elif framework is EquinoxEma:
        assert_same(jax.tree.leaves(theirs.state), jax.tree.leaves(other.state))
    else:
        for a, b in zip(jax.tree.leaves(theirs.state), jax.tree.leaves(other.state), strict=True):
            assert a.dtype == b.dtype
            assert oracle.error(b, a) <= float(jnp.finfo(jnp.float32).eps)


# What PyTorch has and the others have not.


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_torch_options(x64, affine, track, momentum):
    def layer():
        return torch.nn.BatchNorm2d(FEATURES, EPSILON, momentum, affine, track, dtype=torch.float64)

    theirs, other = layer(), layer()
    for x in batches(Torch.shape, seed=4, number=2):
        theirs(torch.tensor(x))
    params, state = convert.from_torch(theirs.state_dict())
    assert (bool(params), state is not None) == (affine, track)
    other.load_state_dict(convert.to_torch(params, state))
    ours = None if momentum is None else 1 - momentum
    for train in (True, True, False):
        for x in batches(Torch.shape, seed=5, number=2):
            y, state = jaxbn.batch_norm(
                params, state, x, train, axis=1, epsilon=EPSILON, momentum=ours
            )
            for module in (theirs, other):
                assert_close(y, module.train(train)(torch.tensor(x)).detach())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("prefix", ["", "net.bn", "net.bn."])
def test_torch_bits(x64, dtype, prefix):
    layer = torch.nn.BatchNorm1d(FEATURES)
    for value in layer.state_dict().values():
        if value.ndim:
            value.copy_(torch.randn(FEATURES))
    layer.num_batches_tracked.fill_(70_000)
    layer = layer.to(getattr(torch, dtype))
    name = prefix and "net.bn."
    state_dict = {name + k: v for k, v in layer.state_dict().items()}
    params, state = convert.from_torch(state_dict, prefix)
    assert {v.dtype.name for v in params.values()} == {dtype}
    assert {v.dtype.name for v in state.values()} == {dtype, "int32"}
    assert int(state["count"]) == 70_000

    result = convert.to_torch(params, state, prefix)
    assert list(result) == list(state_dict)
    module = torch.nn.BatchNorm1d(FEATURES).to(getattr(torch, dtype))
    if prefix:
        module = torch.nn.ModuleDict({"net": torch.nn.ModuleDict({"bn": module})})
    loaded = module.load_state_dict(result, strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    for key, value in module.state_dict().items():
        assert torch.clone(result[key]).dtype == value.dtype == state_dict[key].dtype
        assert torch.equal(value, state_dict[key])
    assert_same(convert.from_torch(result, prefix), (params, state))
    as_jax = {k: jnp.asarray(v) for k, v in result.items()}
    assert_same(convert.from_torch(as_jax, prefix), (params, state))


def test_torch_takes_the_arrays_for_tensors():
    result = convert.to_torch(*random_numbers(("scale", "bias"), np.float32))
    for value in result.values():
        assert isinstance(value, np.ndarray)
        for make in (torch.from_numpy, torch.as_tensor, torch.tensor):
            np.testing.assert_array_equal(make(value).numpy(), value)
    layer = torch.nn.BatchNorm1d(FEATURES)
    layer.load_state_dict({k: torch.from_numpy(v) for k, v in result.items()}, assign=True)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), result["weight"])


def test_no_memory_is_shared():
    theirs = Torch(("scale", "bias"), "float32")
    params, state = theirs.ours()
    before = jax.tree.map(np.array, (params, state))
    with torch.no_grad():
        for value in theirs.layer.state_dict().values():
            value += 1
    assert_same((params, state), before)
    for framework in (convert.to_torch, convert.to_keras):
        for value in framework(params, state).values():
            value += 1
    assert_same((params, state), before)


def test_torch_old_checkpoint():
    state_dict = torch.nn.BatchNorm1d(FEATURES).state_dict()
    del state_dict["num_batches_tracked"]
    params, state = convert.from_torch(state_dict)
    assert sorted(state) == ["mean", "var"]
    result = convert.to_torch(params, state)
    assert result["num_batches_tracked"].dtype == np.int64
    assert result["num_batches_tracked"] == 0


def test_keepdims():
    params, state = jaxbn.init((4, FEATURES, 3, 6), axis=1, keepdims=True, track_count=True)
    flat = jaxbn.init((4, FEATURES), track_count=True)
    assert_same(convert.from_torch(convert.to_torch(params, state)), flat)
    del state["count"], flat[1]["count"]
    assert_same(convert.from_keras(convert.to_keras(params, state)), flat)
    assert_same(convert.from_haiku(*convert.to_haiku(params, state)), (params, state))
    theirs = Equinox(("scale", "bias"), "float32")
    assert_same(
        convert.from_equinox(*convert.to_equinox(params, state, theirs.layer, theirs.state)), flat
    )


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, FEATURES, 3)
        self.bn = torch.nn.BatchNorm2d(FEATURES)

    def forward(self, x):
        return self.bn(self.conv(x))


def torch_model():
    return torch.nn.Sequential(
        Block(),
        torch.nn.Flatten(1),
        torch.nn.LayerNorm(80),
        torch.nn.BatchNorm1d(80, affine=False),
        torch.nn.Linear(80, 6),
        torch.nn.BatchNorm1d(6, track_running_stats=False),
    )


def test_a_whole_model(x64):
    model, other = torch_model().double(), torch_model().double()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(
                lambda module, x, y, name=name: seen.update({name: (x[0].detach(), y.detach())})
            )
    for x in batches((8, 3, 6, 6), seed=6):
        model(torch.tensor(x))
    layers = convert.batch_norms_from_torch(model.state_dict())
    assert list(layers) == ["0.bn", "3"]
    layers["5"] = convert.from_torch(model.state_dict(), "5")

    model.eval()(torch.tensor(batches((8, 3, 6, 6), seed=7)[0]))
    assert seen.keys() == layers.keys()
    for name, (params, state) in layers.items():
        x, y = (v.numpy() for v in seen[name])
        assert_close(jaxbn.batch_norm(params, state, x, False, axis=1)[0], y)

    state_dict = other.state_dict()
    for name, (params, state) in layers.items():
        state_dict |= convert.to_torch(params, state, name)
    other.load_state_dict(state_dict)
    for name in layers:
        a, b = (m.get_submodule(name).state_dict() for m in (model, other))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(model[4].weight, other[4].weight)

    (own,) = convert.batch_norms_from_torch(model[3].state_dict()).items()
    assert own[0] == ""
    assert_same(own[1], layers["3"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files(tmp_path, dtype):
    model = torch_model().to(dtype)
    expected = convert.batch_norms_from_torch(model.state_dict())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for state_dict in (
        safetensors.numpy.load_file(tmp_path / "model.safetensors"),
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
        safetensors.flax.load_file(tmp_path / "model.safetensors"),
        safetensors.torch.load((tmp_path / "model.safetensors").read_bytes()),
        torch.load(tmp_path / "model.pt", weights_only=True),
    ):
        assert_same(convert.batch_norms_from_torch(state_dict), expected)

    params, state = expected["0.bn"]
    safetensors.numpy.save_file(convert.to_torch(params, state), tmp_path / "layer.safetensors")
    state_dict = safetensors.torch.load_file(tmp_path / "layer.safetensors")
    torch.nn.BatchNorm2d(FEATURES, dtype=dtype).load_state_dict(state_dict)
    assert_same(convert.from_torch(state_dict), (params, state))


def test_into_flax():
    theirs = Torch(("scale", "bias"), "float32")
    theirs.load(*random_numbers(("scale", "bias"), np.float32))
    (x,) = batches(Torch.shape, seed=8, number=1)
    x = x.astype(np.float32)
    layer = jaxbn.linen.BatchNorm(use_running_average=True, axis=1, epsilon=EPSILON)
    variables = layer.init(jax.random.key(0), x)
    params, state = convert.from_torch(theirs.layer.state_dict())
    variables = {**variables, "params": params, "batch_stats": state}
    # Each side rounds a value of order one some four times.
    tolerance = 4 * float(jnp.finfo(jnp.float32).eps)
    assert oracle.error(layer.apply(variables, x), theirs.run(x, False)) <= tolerance


def test_equinox_state_of_a_model():
    """Another layer's state is left as it is, and so is the state that was given."""

    class Model(eqx.Module):
        first: eqx.nn.BatchNorm
        second: eqx.nn.BatchNorm

        def __init__(self):
            self.first, self.second = (
                eqx.nn.BatchNorm(FEATURES, "batch", mode=mode) for mode in ("batch", "ema")
            )

    model, state = eqx.nn.make_with_state(Model)()
    before = jax.tree.map(np.array, state)
    ours = random_numbers(("scale", "bias"), np.float32, count=None)
    layer, new_state = convert.to_equinox(*ours, model.second, state)
    assert_same(convert.from_equinox(layer, new_state), ours)
    assert_same(
        convert.from_equinox(model.first, new_state), convert.from_equinox(model.first, state)
    )
    assert_same(jax.tree.leaves(state), jax.tree.leaves(before))
    model = eqx.tree_at(lambda model: model.second, model, layer)
    assert_same(convert.from_equinox(model.second, new_state), ours)


def test_keras_model_by_path():
    model = keras.Sequential([keras.layers.Dense(FEATURES), keras.layers.BatchNormalization()])
    model.build((None, 3))
    ours = random_numbers(("scale", "bias"), np.float32, count=None)
    model.layers[1].set_weights(list(convert.to_keras(*ours).values()))
    weights = {v.path: v.numpy() for v in model.weights}
    prefix = model.layers[1].path
    assert_same(convert.from_keras(weights, prefix), ours)
    assert_same(convert.from_keras(weights, f"{prefix}/"), ours)
    assert convert.to_keras(*ours, prefix).keys() < weights.keys()


def test_float64_without_64_bit_types():
    """Rounded to float32, as everywhere in JAX."""
    third = np.full(FEATURES, 1 / 3)
    params, _ = convert.from_torch({"weight": third, "bias": third})
    assert_same(params, {k: third.astype(np.float32) for k in ("scale", "bias")})


def test_haiku_modules_by_name():
    ours = random_numbers(("scale", "bias"), np.float32)
    params, state = convert.to_haiku(*ours, name="net/~/norm")
    assert list(params) == ["net/~/norm"]
    assert list(state) == ["net/~/norm/~/mean_ema", "net/~/norm/~/var_ema"]
    more = convert.to_haiku(*random_numbers((), np.float32, seed=9))
    merged = params | more[0], state | more[1]
    assert_same(convert.from_haiku(*merged, name="net/~/norm"), ours)


ONES = np.ones(4, np.float32)
THREE = np.ones(3, np.float32)
TORCH = {"weight": ONES, "bias": ONES, "running_mean": ONES, "running_var": ONES}
KERAS = {"gamma": ONES, "beta": ONES, "moving_mean": ONES, "moving_variance": ONES}
PARAMS = {"scale": ONES, "bias": ONES}
STATE = {"mean": ONES, "var": ONES}
EMA = {"hidden": ONES, "average": ONES, "counter": np.int32(1)}
AVERAGES = {"bn/~/mean_ema": EMA, "bn/~/var_ema": EMA}
WITHOUT_VAR = {"mean": ONES}


def equinox_layer(**options):
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    return make(4, "batch", mode="batch", **options)


# name: (call, exception, its whole text)
ERRORS = {
    "from torch: keys": (
        lambda: convert.from_torch({"weight": THREE, 3: THREE}),
        TypeError,
        "state_dict must have names as keys, got 3.",
    ),
    "model of torch: keys": (
        lambda: convert.batch_norms_from_torch({k: THREE for k in (3, b"x", None, 4)}),
        TypeError,
        "state_dict must have names as keys, got 3, b'x', None.",
    ),
    "torch: all at once": (
        lambda: convert.from_torch(
            {
                "bias": np.ones(4, np.int64),
                "running_mean": THREE,
                "weight": ONES,
                "eps": ONES,
                "num_batches_tracked": ONES,
            }
        ),
        ValueError,
        "state_dict does not hold one batch norm: missing running_var; extra eps; bias has dtype "
        "int64, want a floating one; running_mean has shape (3,), want (4,), that of weight; "
        "num_batches_tracked has shape (4,) and dtype float32, want a scalar of an integer dtype.",
    ),
    "torch: under a prefix": (
        lambda: convert.from_torch({"a.weight": ONES, "a.fc.weight": ONES, "b": ONES}, "a"),
        ValueError,
        "state_dict does not hold one batch norm: missing a.bias; extra a.fc.weight.",
    ),
    "torch: another prefix": (
        lambda: convert.from_torch({"bn1.weight": ONES, "bn1.bias": ONES}, "bn"),
        ValueError,
        "state_dict does not hold one batch norm: no entry of the 2 begins with 'bn.'.",
    ),
    "torch: a count alone": (
        lambda: convert.from_torch({"num_batches_tracked": np.int64(3)}),
        ValueError,
        "state_dict does not hold one batch norm: missing running_mean, running_var.",
    ),
    "torch: not one axis": (
        lambda: convert.from_torch(TORCH | {"weight": np.ones((1, 4), np.float32)}),
        ValueError,
        "state_dict does not hold one batch norm: weight has shape (1, 4), want (C,).",
    ),
    "torch: too many batches": (
        lambda: convert.from_torch(TORCH | {"num_batches_tracked": np.int64(2**31)}),
        ValueError,
        "state_dict does not hold one batch norm: num_batches_tracked is 2147483648, want a "
        "number from 0 to 2147483647.",
    ),
    "torch: no mapping": (
        lambda: convert.from_torch(torch.nn.BatchNorm1d(4)),
        TypeError,
        "state_dict must be a mapping, got BatchNorm1d.",
    ),
    "torch: models": (
        lambda: convert.batch_norms_from_torch(
            {"a.running_mean": ONES, "b.running_var": ONES, "b.running_mean": THREE}
        ),
        ValueError,
        "state_dict holds batch norms that are not whole: missing a.running_var; b.running_var "
        "has shape (4,), want (3,), that of b.running_mean.",
    ),
    "torch: a model whose norm has lost its statistics": (
        lambda: convert.batch_norms_from_torch({"a.num_batches_tracked": np.int64(1)}),
        ValueError,
        "state_dict holds batch norms that are not whole: missing a.running_mean, a.running_var.",
    ),
    "to torch: half affine": (
        lambda: convert.to_torch({"bias": ONES}, STATE),
        ValueError,
        "PyTorch's batch norm cannot hold these params and state: missing params['scale']: "
        "PyTorch has a weight and a bias, or neither.",
    ),
    "to torch: all at once": (
        lambda: convert.to_torch(
            {"scale": ONES, "bias": np.ones((2, 2), np.float32), "gamma": ONES},
            {"mean": THREE, "count": np.int32(-1), "n": 1},
        ),
        ValueError,
        "PyTorch's batch norm cannot hold these params and state: missing state['var']; extra "
        "params['gamma'], state['n']; params['bias'] has shape (2, 2), want (C,); state['mean'] "
        "has shape (3,), want (4,), that of params['scale']; state['count'] is -1, want a number "
        "from 0 to 2147483647.",
    ),
    "to torch: no mapping": (
        lambda: convert.to_torch(None, STATE),
        TypeError,
        "params must be a mapping, got NoneType.",
    ),
    "keras: all at once": (
        lambda: convert.from_keras({"a/gamma": ONES, "a/moving_mean": THREE, "a/c": ONES}, "a"),
        ValueError,
        "weights do not hold one batch norm: missing a/moving_variance; extra a/c; a/moving_mean "
        "has shape (3,), want (4,), that of a/gamma.",
    ),
    "to keras: no state": (
        lambda: convert.to_keras(PARAMS, None),
        ValueError,
        "Keras's batch norm cannot hold these params and state: state is None, and Keras's layer "
        "always has running statistics.",
    ),
    "haiku: all at once": (
        lambda: convert.from_haiku(
            {"bn": {"scale": THREE, "bias": ONES}},
            {"bn/~/mean_ema": {"hidden": ONES, "average": ONES, "counter": np.int32(2)}},
            "bn",
        ),
        ValueError,
        "params and state do not hold this batch norm of Haiku's: missing state['bn/~/var_ema']; "
        "extra params['bn']['bias']; state['bn/~/mean_ema']['hidden'] has shape (4,), want (3,), "
        "that of params['bn']['scale']; state['bn/~/mean_ema']['average'] has shape (4,), want "
        "(3,), that of params['bn']['scale'].",
    ),
    "haiku: an entry": (
        lambda: convert.from_haiku(
            {}, AVERAGES | {"bn/~/var_ema": {"average": ONES, "counter": np.int32(2)}}, "bn"
        ),
        ValueError,
        "params and state do not hold this batch norm of Haiku's: missing "
        "state['bn/~/var_ema']['hidden']; state['bn/~/mean_ema']['counter'] is 1 and "
        "state['bn/~/var_ema']['counter'] is 2, want the same.",
    ),
    "to haiku: shape": (
        lambda: convert.to_haiku(PARAMS, STATE | {"var": THREE}, shape=(1, 1, 1, 4)),
        ValueError,
        "Haiku's batch norm cannot hold these params and state: state['var'] has shape (3,), "
        "which does not fit (1, 1, 1, 4).",
    ),
    "to haiku: momentum": (
        lambda: convert.to_haiku(PARAMS, STATE, momentum=1.0),
        ValueError,
        "momentum must lie in [0, 1), got 1.0.",
    ),
    "to haiku: no state": (
        lambda: convert.to_haiku(PARAMS, None),
        ValueError,
        "Haiku's batch norm cannot hold these params and state: state is None, and Haiku's layer "
        "always has running statistics.",
    ),
    "equinox: another layer": (
        lambda: convert.from_equinox(eqx.nn.Identity(), None),
        TypeError,
        "layer must be an equinox.nn.BatchNorm, got Identity.",
    ),
    "equinox: another size": (
        lambda: convert.from_equinox(
            *(eqx.tree_at(lambda layer: layer.bias, equinox_layer()[0], THREE), equinox_layer()[1])
        ),
        ValueError,
        "layer and state do not hold a batch norm: layer.bias has shape (3,), want (4,), that of "
        "layer.weight.",
    ),
    "to equinox: all at once": (
        lambda: convert.to_equinox({"scale": THREE}, WITHOUT_VAR, *equinox_layer()),
        ValueError,
        "this batch norm of Equinox's cannot hold these params and state: missing state['var']; "
        "missing params['bias']; params['scale'] has shape (3,), want (4,), that of the layer's "
        "mean.",
    ),
    "to equinox: params for a plain layer": (
        lambda: convert.to_equinox(PARAMS, STATE, *equinox_layer(channelwise_affine=False)),
        ValueError,
        "this batch norm of Equinox's cannot hold these params and state: extra params['scale'], "
        "params['bias'].",
    ),
    "to equinox: no state": (
        lambda: convert.to_equinox(PARAMS, None, *equinox_layer()),
        ValueError,
        "this batch norm of Equinox's cannot hold these params and state: state is None, and "
        "Equinox's layer always has running statistics.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, exception, text = ERRORS[name]
    with pytest.raises(exception) as raised:
        call()
    assert str(raised.value) == text


def test_good_entries_are_no_error():
    """What the cases of `ERRORS` differ from."""
    assert_same(convert.from_torch(TORCH), (PARAMS, STATE))
    assert_same(convert.from_keras(KERAS), (PARAMS, STATE))
    params = {"bn": {"scale": ONES, "offset": ONES}}
    expected = PARAMS, STATE | {"count": np.int32(1)}
    assert_same(convert.from_haiku(params, AVERAGES, "bn"), expected)
    assert_same(convert.from_torch({}), ({}, None))
    assert convert.to_torch({}, None) == {}


def test_imports_no_framework():
    code = (
        "import sys, jaxbn.convert; "
        "print({'torch', 'keras', 'haiku', 'equinox', 'flax', 'safetensors'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "set()\n"
