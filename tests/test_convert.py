"""Layers of the frameworks and jaxbn's compute the same, before and after conversion."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxbn
from jaxbn import convert
from tests import oracle
from tests.conversion import (
    CASES,
    FEATURES,
    FRAMEWORKS,
    Equinox,
    EquinoxEma,
    Haiku,
    Keras,
    Torch,
    assert_close,
    assert_evaluates_alike,
    assert_same,
    assert_trains_alike,
    batches,
    ignore_keras_warning,
    random_numbers,
)

pytestmark = ignore_keras_warning


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("framework", "params"), CASES)
def test_training_continues_in_jaxbn(x64, framework, params, steps):
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
def test_training_continues_in_the_framework(x64, framework, params, count):
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


# Where it counts batches, Equinox multiplies and divides by the same correction: two roundings.
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize(("framework", "params"), CASES)
def test_to_the_framework_and_back(x64, framework, params, count, dtype):
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
def test_from_the_framework_and_back(framework):
    """After some training in float32, the framework's values are the same again."""
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
        # Divided and multiplied by the same correction: two roundings.
        for a, b in zip(*hidden, strict=True):
            assert oracle.error(b, a) <= float(jnp.finfo(jnp.float32).eps)
    elif framework is EquinoxEma:
        assert_same(jax.tree.leaves(theirs.state), jax.tree.leaves(other.state))
    else:
        for a, b in zip(jax.tree.leaves(theirs.state), jax.tree.leaves(other.state), strict=True):
            assert a.dtype == b.dtype
            assert oracle.error(b, a) <= float(jnp.finfo(jnp.float32).eps)


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


def test_float64_without_64_bit_types():
    """Values are rounded to float32, as everywhere in JAX."""
    third = np.full(FEATURES, 1 / 3)
    params, _ = convert.from_torch({"weight": third, "bias": third})
    assert_same(params, {k: third.astype(np.float32) for k in ("scale", "bias")})


def test_imports_no_framework():
    code = (
        "import sys, jaxbn.convert; "
        "print({'torch', 'keras', 'haiku', 'equinox', 'flax', 'safetensors'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "set()\n"
