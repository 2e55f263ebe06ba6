"""The adapters: the frameworks' layers as the parity tools call them."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.parity as parity
from tests.raises import raises

os.environ.setdefault("KERAS_BACKEND", "jax")

C = 5
X = np.ones((8, C), np.float32)


def make_linen(module):
    return parity.linen_layer(module, module.init(jax.random.key(0), X))


def make_flax_linen(**options):
    import flax.linen

    return make_linen(flax.linen.BatchNorm(use_running_average=False, **options))


def make_nnx(make=None, **options):
    from flax import nnx

    return parity.nnx_layer((make or nnx.BatchNorm)(C, rngs=nnx.Rngs(0), **options))


def make_torch(kind, **options):
    import torch

    return parity.torch_layer(getattr(torch.nn, kind)(C, **options))


def make_keras(shape=(None, C), **options):
    import keras

    layer = keras.layers.BatchNormalization(**options)
    layer.build(shape)
    return parity.keras_layer(layer)


def make_haiku(*options, x=X, **keywords):
    import haiku as hk

    norm = hk.transform_with_state(lambda x, train: hk.BatchNorm(*options, **keywords)(x, train))
    return parity.haiku_layer(norm, *norm.init(None, jnp.asarray(x), True))


def make_equinox(**options):
    import equinox as eqx

    return parity.equinox_layer(*eqx.nn.make_with_state(eqx.nn.BatchNorm)(C, "batch", **options))


def make_ours(convention, **options):
    params, state = jaxbn.init((8, C), track_count=convention["momentum"] is None, **options)
    return parity.batch_norm_layer(params, state, **convention)


def convention(momentum, epsilon, batch_variance, running_variance):
    return {
        "momentum": momentum,
        "epsilon": epsilon,
        "batch_variance": batch_variance,
        "running_variance": running_variance,
    }


LAYERS = {
    "ours, exercise": (lambda: make_ours(jaxbn.EXERCISE), jaxbn.EXERCISE),
    "ours, Keras": (lambda: make_ours(jaxbn.KERAS, use_scale=False), jaxbn.KERAS),
    "ours, cumulative": (
        lambda: make_ours({**jaxbn.PYTORCH, "momentum": None}),
        {**jaxbn.PYTORCH, "momentum": None},
    ),
    "our linen": (
        lambda: make_linen(
            jaxbn.linen.BatchNorm(
                False, axis=1, **{**jaxbn.PYTORCH, "momentum": None, "epsilon": 1e-4}
            )
        ),
        convention(None, 1e-4, "biased", "unbiased"),
    ),
    "our nnx": (lambda: make_nnx(jaxbn.nnx.BatchNorm, **jaxbn.EXERCISE), jaxbn.EXERCISE),
    "linen": (make_flax_linen, jaxbn.FLAX),
    "linen, options": (
        lambda: make_flax_linen(
            axis=1, momentum=0.5, epsilon=0.1, use_scale=False, axis_name="data"
        ),
        convention(0.5, 0.1, "biased", "biased"),
    ),
    "nnx": (make_nnx, jaxbn.FLAX),
    "nnx, options": (
        lambda: make_nnx(axis=-3, momentum=0.999, epsilon=1e-6, use_bias=False),
        convention(0.999, 1e-6, "biased", "biased"),
    ),
    "BatchNorm1d": (lambda: make_torch("BatchNorm1d"), jaxbn.PYTORCH),
    "BatchNorm2d": (
        lambda: make_torch("BatchNorm2d", momentum=None, affine=False),
        {**jaxbn.PYTORCH, "momentum": None},
    ),
    "BatchNorm3d": (
        lambda: make_torch("BatchNorm3d", momentum=0.25, eps=0.02),
        convention(0.75, 0.02, "biased", "unbiased"),
    ),
    "Keras": (make_keras, jaxbn.KERAS),
    "Keras, options": (
        lambda: make_keras((None, C, 2, 2), axis=1, momentum=0.9, epsilon=1e-5, center=False),
        convention(0.9, 1e-5, "biased", "biased"),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_convention_is_identified(name):
    make, expected = LAYERS[name]
    assert parity.identify(make(), C) == expected


@pytest.mark.parametrize(
    "make, averages",
    [
        (lambda: make_haiku(True, True, 0.9, eps=1e-4), "bias-corrected"),
        (
            lambda: make_haiku(False, False, 0.9, eps=1e-4, data_format="NC..."),
            "bias-corrected",
        ),
        (
            lambda: make_equinox(mode="batch", momentum=0.9, eps=1e-4),
            "bias-corrected, with the initial variance left in",
        ),
    ],
)
def test_a_bias_correction_is_named(make, averages):
    with pytest.raises(parity.ConventionError, match=averages) as caught:
        parity.identify(make(), C)
    expected = convention(0.9, 1e-4, "biased", "biased")
    assert caught.value.found == {**expected, "averages": averages}


def test_equinox_in_mode_ema_follows_no_convention():
    with pytest.raises(parity.ConventionError, match=r"weights 1, 0\.01, 0\.01"):
        parity.identify(make_equinox(mode="ema"), C)
    trained = make_equinox(mode="ema")
    trained.train(X + np.random.default_rng(0).normal(size=X.shape).astype(np.float32))
    with pytest.raises(parity.ConventionError) as caught:
        parity.identify(trained, C)
    assert caught.value.probe == "batch variance"


def test_parameters_that_a_layer_lacks_have_no_gradients():
    layers = [
        (make_ours(jaxbn.FLAX, use_scale=False), {"x", "bias"}),
        (make_flax_linen(use_scale=False, use_bias=False), {"x"}),
        (make_nnx(use_bias=False), {"x", "scale"}),
        (make_torch("BatchNorm2d", affine=False), {"x"}),
        (make_keras(center=False), {"x", "scale"}),
        (make_haiku(False, True, 0.9), {"x", "bias"}),
        (make_equinox(mode="batch", channelwise_affine=False), {"x"}),
    ]
    for layer, names in layers:
        assert layer.step(X, X)[1].keys() == names


def test_the_layer_itself_is_not_changed():
    import keras
    import torch
    from flax import nnx

    mine = torch.nn.BatchNorm1d(C).eval()
    theirs = nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    third = keras.layers.BatchNormalization()
    third.build((None, C))
    for layer in (parity.torch_layer(mine), parity.nnx_layer(theirs), parity.keras_layer(third)):
        layer.train(X)
        assert (layer.running()[0] != 0).all()
    assert not mine.running_mean.any() and not mine.training
    assert not theirs.mean[...].any()
    assert not np.asarray(third.moving_mean).any()


@pytest.mark.parametrize("groups", [None, [[0, 1], [2, 3]]])
@pytest.mark.parametrize("package", ["flax", "jaxbn"])
def test_axis_names_are_removed(package, groups):
    """A layer that is made for several devices runs on one, where its axis name is not bound."""
    import flax.linen
    from flax import nnx

    options = {"axis_name": "data", "axis_index_groups": groups, "momentum": 0.5}
    modules = {"flax": (flax.linen, nnx), "jaxbn": (jaxbn.linen, jaxbn.nnx)}[package]
    layers = [kind.BatchNorm for kind in modules]
    expected = convention(0.5, 1e-5, "biased", "biased")
    biased = {"running_variance": "biased"} if package == "jaxbn" else {}
    of_linen = make_linen(layers[0](use_running_average=False, **options, **biased))
    assert parity.identify(of_linen, C) == expected

    layer = layers[1](C, rngs=nnx.Rngs(0), **options, **biased)
    assert parity.identify(parity.nnx_layer(layer), C) == expected
    assert layer.axis_name == "data"


def test_a_trained_layer_keeps_its_count_of_batches():
    import torch

    layer = torch.nn.BatchNorm1d(C, momentum=None)
    for _ in range(7):
        layer(torch.ones(4, C))
    assert parity.identify(parity.torch_layer(layer), C)["momentum"] is None


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_gradients_are_computed_if_torch_has_them_turned_off(mode, rng):
    import torch

    x, dy = rng.normal(size=(2, 8, C)).astype(np.float32)
    y, gradients = make_torch("BatchNorm2d").step(x, dy)
    with getattr(torch, mode)():
        layer = make_torch("BatchNorm2d")
        found, others = layer.step(x, dy)
        layer.train(x)
    layer.step(x, dy)
    np.testing.assert_array_equal(found, y)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(others[name], gradient)


def test_half_precision_is_accepted():
    x = X.astype(jnp.bfloat16)
    for layer in (make_torch("BatchNorm1d"), make_flax_linen(), make_ours(jaxbn.PYTORCH)):
        y, gradients = layer.step(x, x)
        assert y.shape == gradients["x"].shape == x.shape


def test_what_cannot_be_adapted(monkeypatch):
    import equinox as eqx
    import haiku as hk
    import keras
    import torch

    with raises(ValueError, "the layer keeps no running statistics; there is nothing to identify."):
        make_torch("BatchNorm1d", track_running_stats=False)
    with raises(
        TypeError,
        "the layer must be a torch.nn.BatchNorm1d, 2d or 3d, or have the attributes "
        "running_mean and running_var, got torch.nn.modules.normalization.LayerNorm.",
    ):
        parity.torch_layer(torch.nn.LayerNorm(C))
    with raises(
        ValueError, "the layer's axis is (1, 2); only a single feature axis can be probed."
    ):
        parity.batch_norm_layer(*jaxbn.init((8, C)), axis=(1, 2))
    with raises(ValueError, "the layer is not built; call layer.build((None, num_features))."):
        parity.keras_layer(keras.layers.BatchNormalization())
    with raises(ValueError, "the layer's axis_name is ('a', 'b'); it must be one name."):
        parity.equinox_layer(*eqx.nn.make_with_state(eqx.nn.BatchNorm)(C, ("a", "b"), mode="batch"))
    empty = hk.transform_with_state(lambda x, train: x)
    with raises(ValueError, "the state holds 0 batch norms, []; it must hold exactly one."):
        parity.haiku_layer(empty, *empty.init(None, X, True))
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with raises(
        ValueError,
        "Keras runs on its tensorflow backend; set KERAS_BACKEND=jax in the environment before "
        "importing it.",
    ):
        make_keras()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_too_coarse_to_identify(dtype):
    import torch

    layer = torch.nn.BatchNorm1d(4).to(getattr(torch, dtype))
    words = f"it computes in .*{dtype}.*, which is too coarse to identify a convention; "
    with pytest.raises(parity.ConventionError, match=words):
        parity.identify(parity.torch_layer(layer), 4)
