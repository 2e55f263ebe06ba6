"""Functions with the same program share what is compiled; functions with others do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbn.parity._adapters import shared_jit as module
from jaxbn.parity._adapters.shared_jit import shared_jit
from tests.compilations import counted

X, Y = np.array([[1, 2, 3], [5, 7, 9]], np.float32)


def adds(constant):
    return lambda x, y: x + constant


def scales(array):
    return lambda x, y: x[None] * array


def calls(function):
    return lambda x, y: jax.pure_callback(function, jax.ShapeDtypeStruct((3,), jnp.float32), x)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})


def test_the_same_program_is_compiled_once():
    def named(name):
        return lambda x: {name: (x[name] + 1, None)}

    with counted() as compilations:
        y = shared_jit(named("a"))({"a": X})
    assert len(compilations) == 1
    with counted() as compilations:
        z = shared_jit(named("b"))({"b": X})
    assert not compilations
    assert y.keys() == {"a"} and z.keys() == {"b"} and z["b"][1] is None
    np.testing.assert_array_equal(z["b"][0], X + 1)


SMALL = np.float32(1e-5)
LARGE = np.linspace(0, 1, 3000, dtype=np.float32).reshape(1000, 3)
ALMOST = LARGE.copy()
ALMOST[500, 1] = np.nextafter(LARGE[500, 1], SMALL)
PAIRS = {
    "scalars": (lambda x, y: x * SMALL, lambda x, y: x * np.nextafter(SMALL, X[0])),
    "captured arrays": (scales(LARGE), scales(ALMOST)),
    "captured arrays of JAX": (scales(jnp.asarray(LARGE)), scales(jnp.asarray(ALMOST))),
    "used arguments": (lambda x, y: x + 1, lambda x, y: y + 1),
    "order of results": (lambda x, y: (x, y), lambda x, y: (y, x)),
    "Python functions": (calls(np.sin), calls(np.cos)),
}


@pytest.mark.parametrize("first, second", PAIRS.values(), ids=PAIRS.keys())
def test_what_differs_is_not_shared(first, second):
    found = [jax.tree.leaves(shared_jit(function)(X, Y)) for function in (first, second, first)]
    # These are compiled, too, since compiling can change the last bits.
    wanted = [jax.tree.leaves(jax.jit(function)(X, Y)) for function in (first, second, first)]
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not all(map(np.array_equal, found[0], found[1]))


def test_other_shapes_and_dtypes_are_other_programs():
    double = shared_jit(lambda x: 2 * x)
    for x in (X, X[:2], X.astype(np.int32), X):
        y = double(x)
        np.testing.assert_array_equal(y, 2 * x)
        assert y.dtype == x.dtype
    assert len(module._compiled) == 3


def test_the_configuration_is_that_of_the_call():
    third = shared_jit(lambda x: x * jnp.asarray(np.float64(1) / 3))
    promotes = shared_jit(lambda x: x + jnp.int32(1))
    for _ in range(2):
        assert third(X).dtype == jnp.float32
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            assert third(X).dtype == jnp.float64
        with jax.numpy_dtype_promotion("standard"):
            promotes(X)
        with jax.numpy_dtype_promotion("strict"), pytest.raises(jax.dtypes.TypePromotionError):
            promotes(X)


def test_the_oldest_program_is_dropped(monkeypatch):
    monkeypatch.setattr(module, "_MAX_COMPILED", 2)
    functions = [shared_jit(adds(float(i))) for i in range(3)]
    for _ in range(2):
        for i, function in enumerate(functions):
            np.testing.assert_array_equal(function(X, Y), X + i)
    assert len(module._compiled) == 2
    with counted() as compilations:
        shared_jit(adds(2.0))(X, Y)
    assert not compilations
    with counted() as compilations:
        shared_jit(adds(0.0))(X, Y)
    assert len(compilations) == 1
