"""Layers with equal options are identified with the same compiled programs."""

import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.parity import (
    ConventionError,
    batch_norm_layer,
    equinox_layer,
    haiku_layer,
    identify,
    keras_layer,
    linen_layer,
    nnx_layer,
)
from jaxbn.parity._adapters import shared_jit
from jaxbn.parity._adapters.jax_function import JaxFunctionLayer, mean_and_var
from tests.compilations import counted
from tests.numpy_layers import NumpyBatchNorm

os.environ.setdefault("KERAS_BACKEND", "jax")


def of_linen(module):
    def make(size, **options):
        layer = module(use_running_average=False, **options)
        return linen_layer(layer, layer.init(jax.random.key(0), jnp.ones((2, size))))

    return make


def of_nnx(module):
    return lambda size, **options: nnx_layer(module(size, rngs=nnx.Rngs(0), **options))


def of_function(size, **options):
    return batch_norm_layer(*jaxbn.init((2, size)), **options)


MAKERS = {
    "function": of_function,
    "linen": of_linen(jaxbn.linen.BatchNorm),
    "flax linen": of_linen(nn.BatchNorm),
    "nnx": of_nnx(jaxbn.nnx.BatchNorm),
    "flax nnx": of_nnx(nnx.BatchNorm),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_sizes_share_programs_and_options_do_not(make):
    first, second = (make(size, momentum=0.9).repeated(16) for size in (3, 5))
    assert first._programs is second._programs
    assert first._programs is not make(3, momentum=0.8).repeated(16)._programs


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_features_are_repeated(make, rng):
    layer, x = make(3), rng.normal(1, 2, (8, 3)).astype(np.float32)
    repeated = make(3).repeated(7)
    columns = [0, 1, 2, 0, 1, 2, 0]
    # Both compute the same values, of order one, with a few roundings in another order.
    tolerance = 8 * np.finfo(np.float32).eps
    for _ in range(2):
        y, wanted = repeated.train(x[:, columns]), layer.train(x)[:, columns]
        np.testing.assert_allclose(y, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    for found, wanted in zip(repeated.running(), layer.running(), strict=True):
        np.testing.assert_allclose(found, wanted[columns], rtol=tolerance)


def haiku_layers(sizes, momentum=0.9, epsilon=1e-4):
    """Return layers of this framework as a network has them: with names of their own."""
    import haiku as hk

    def make(i, size):
        norm = hk.transform_with_state(
            lambda x, train: hk.BatchNorm(True, True, momentum, epsilon, name=f"norm_{i}")(x, train)
        )
        return haiku_layer(norm, *norm.init(None, jnp.ones((2, size)), True))

    return [make(i, size) for i, size in enumerate(sizes)]


def equinox_layers(sizes, momentum=0.9, epsilon=1e-4):
    import equinox as eqx

    class Network(eqx.Module):
        norms: list[eqx.nn.BatchNorm]

        def __init__(self):
            options = {"momentum": momentum, "eps": epsilon, "mode": "batch"}
            self.norms = [eqx.nn.BatchNorm(size, "batch", **options) for size in sizes]

    network, state = eqx.nn.make_with_state(Network)()
    return [equinox_layer(norm, state) for norm in network.norms]


def keras_layers(sizes, momentum=0.9, epsilon=1e-4):
    import keras

    def make(size):
        norm = keras.layers.BatchNormalization(momentum=momentum, epsilon=epsilon)
        norm.build((None, size))
        return keras_layer(norm)

    return [make(size) for size in sizes]


OTHERS = {"haiku": haiku_layers, "equinox": equinox_layers, "keras": keras_layers}


def found_in(layer, size):
    try:
        return identify(layer, size)
    except ConventionError as error:
        # The averages of Haiku and Equinox are bias-corrected, but all else is found.
        assert "bias-corrected" in error.found["averages"]
        return error.found


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    "framework, sizes", [("haiku", [3] * 3), ("keras", [3] * 3), ("equinox", [3, 5, 3])]
)
def test_further_layers_of_a_network_compile_nothing(framework, sizes, monkeypatch):
    monkeypatch.setattr(shared_jit, "_compiled", {})
    first, *others = OTHERS[framework](sizes)
    with counted() as compilations:
        convention = found_in(first, sizes[0])
    # Training at three batch sizes, and evaluation.
    assert len(compilations) >= 4
    with counted() as compilations:
        for layer, size in zip(others, sizes[1:], strict=True):
            assert found_in(layer, size) == convention
    assert not compilations


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS.keys())
def test_layers_with_other_options_compute_with_their_own(make):
    options = [(0.9, 1e-4), (0.8, 1e-4), (0.9, 1e-3), (0.9, 1e-4)]
    for momentum, epsilon in options:
        (layer,) = make([3], momentum=momentum, epsilon=epsilon)
        found = found_in(layer, 3)
        assert (found["momentum"], found["epsilon"]) == (momentum, epsilon)


def test_a_second_size_compiles_nothing():
    traced = []

    def apply(params, state, x, train):
        traced.append(x.shape)
        return jaxbn.batch_norm(params, state, x, train, **jaxbn.PYTORCH)

    numbers = []
    for size in (3, 5, 1):
        params, state = jaxbn.init((2, size))
        layer = JaxFunctionLayer(apply, params, state, mean_and_var, with_features=lambda _: apply)
        assert identify(layer, size) == jaxbn.PYTORCH
        numbers.append(len(traced))
    assert numbers[0] > 0 and numbers == [numbers[0]] * 3


def test_what_cannot_be_repeated_is_probed_as_it_is():
    """A parameter that is not one per feature, and options that cannot be compared."""
    params, state = jaxbn.init((2, 4))
    layer = batch_norm_layer(params, state, **{**jaxbn.PYTORCH, "momentum": jnp.float32(0.9)})
    assert layer.repeated(8) is None
    assert identify(layer, 4) == jaxbn.PYTORCH
    layer = batch_norm_layer({**params, "scale": jnp.ones((2, 4))}, state)
    assert layer.repeated(8) is None


def test_a_layer_of_the_user_keeps_its_size(rng):
    layer = NumpyBatchNorm(rng, features=3)
    assert identify(layer, 3) == jaxbn.PYTORCH
    assert layer.mean.shape == (3,)
