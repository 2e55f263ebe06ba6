"""Comparing two networks of any frameworks: names are found, and dropout is named."""

import keras
import numpy as np
import pytest
from flax import nnx

import jaxbn
from jaxbn.parity import compare_models, match_names
from tests.framework_networks import (
    NAMES,
    keras_net,
    linen_net,
    nnx_net,
    rows,
    torch_net,
)
from tests.raises import raises

# Of three layers' sums of five terms, in float32.
RTOL = 1e-5
KERAS = {"momentum": 0.9, "epsilon": 1e-5}
SAME = {name: name for name in NAMES}


def make(kind, **options):
    """Return a network with the numbers of the network in PyTorch."""
    theirs = torch_net()
    makers = {
        "linen": lambda: linen_net(theirs, **options),
        "bound linen": lambda: (lambda module, v: module.bind(v))(*linen_net(theirs, **options)),
        "nnx": lambda: nnx_net(theirs, **options),
        "nnx split": lambda: nnx.split(nnx_net(theirs, **options)),
        "nnx split in three": lambda: nnx.split(nnx_net(theirs, **options), nnx.Param, ...),
        "keras": lambda: keras_net(theirs, **{**KERAS, **options}),
        "torch": lambda: theirs,
    }
    return makers[kind]()


@pytest.mark.parametrize(
    ("candidate", "reference", "options"),
    [
        ("bound linen", "torch", {}),
        ("nnx", "torch", {}),
        ("torch", "nnx split in three", {}),
        ("keras", "linen", {"running_variance": "biased"}),
        ("nnx split", "linen", {"running_variance": "biased"}),
    ],
)
def test_equal_networks_agree(candidate, reference, options):
    first = make(candidate, **options if "linen" not in candidate and candidate != "keras" else {})
    second = make(reference, **options if reference != "torch" else {})
    report = compare_models(first, second, rows(), rtol=RTOL)
    assert report.ok, str(report)
    names = {row.name for row in report.rows if row.stage == "training forward"}
    expected = NAMES.values() if candidate == "torch" else NAMES
    assert names == {*expected, "(output)"}
    assert {row.stage for row in report.rows} == {
        *("evaluation forward", "training forward", "running statistics"),
        *("evaluation backward", "training backward"),
    }
    assert report.notes == ()


@pytest.mark.parametrize("kind", ["nnx", "keras"])
def test_a_network_is_not_changed(kind):
    network = make(kind)
    x = rows()
    call = (lambda: network(x, training=False)) if kind == "keras" else (lambda: network(x))
    if kind == "nnx":
        network.eval()
    before = np.asarray(call())
    original = keras.layers.Layer.__call__
    compare_models(network, torch_net(), x, rtol=1)
    np.testing.assert_array_equal(np.asarray(call()), before)
    assert keras.layers.Layer.__call__ is original
    if kind == "nnx":
        assert network.block.norm.use_running_average and type(network).__name__ == "NnxNet"
        assert {type(m).__module__ for _, m in nnx.iter_modules(network)} == {
            *("tests.framework_networks", "jaxbn.nnx._batch_norm"),
            *("flax.nnx.nn.linear", "flax.nnx.nn.stochastic"),
        }


@pytest.mark.parametrize(
    ("kind", "label", "name"),
    [
        ("linen", "Flax", "block/drop"),
        ("nnx", "Flax", "block/drop"),
        ("keras", "Keras", "block/drop"),
        ("torch", "PyTorch", "1.drop"),
    ],
)
def test_active_dropout_is_named(kind, label, name):
    networks = [torch_net(dropout=0.5), linen_net(torch_net())]
    if kind != "torch":
        networks = [make(kind, dropout=0.5), torch_net()]
    report = compare_models(*networks, rows(), rtol=1e-5)
    note = f"in training, {label}'s dropout is active, so what follows it is random: {name}"
    assert report.notes == (note,)
    # Evaluation has no dropout, and training agrees up to it.
    assert {row.stage for row in report.rows if not row.relative <= 1e-5} >= {"training forward"}
    assert report.first_difference.stage != "evaluation forward"


def test_two_networks_of_one_framework_are_candidate_and_reference():
    theirs = torch_net()
    with raises(
        ValueError,
        "each name must be called exactly once; calls in the reference: {'norm': 0}. These are "
        "called once: ['block', 'block/drop', 'block/head', 'block/norm', 'dense'].",
    ):
        compare_models(nnx_net(theirs), linen_net(theirs), rows(), {"dense": "norm"})
    with raises(
        ValueError,
        "names has ['norm'], which the reference does not have; it has ['0', '1', '1.drop', "
        "'1.head', '1.norm', '1.relu'].",
    ):
        compare_models(theirs, torch_net(), rows(), {"0": "norm"})


@pytest.mark.parametrize("kind", ["linen", "nnx", "keras"])
def test_names_are_found(kind):
    assert match_names(make(kind), torch_net(), rows()) == NAMES
    assert match_names(torch_net(), make(kind), rows()) == {v: k for k, v in NAMES.items()}


def test_names_need_only_shapes():
    module, _ = linen_net(torch_net())
    assert match_names(module, torch_net(), rows()) == NAMES
    shapes = nnx.eval_shape(lambda: nnx_net(torch_net()))
    assert match_names(shapes, torch_net(), rows()) == NAMES


def test_a_network_of_no_known_kind():
    with raises(
        TypeError,
        "reference must be a Linen module with its variables, an NNX module or the parts of "
        "nnx.split, a Keras model, or a PyTorch module; got function.",
    ):
        compare_models(torch_net(), jaxbn.batch_norm, rows())


def test_names_in_the_place_of_x():
    with raises(
        TypeError, "x must be an array, got a mapping; names come after x, or are left out."
    ):
        compare_models(torch_net(), torch_net(), NAMES, rows())


def test_a_keras_model_that_is_not_built():
    with raises(ValueError, "the model in Keras is not built; call it on an input first."):
        compare_models(keras.Sequential([keras.layers.Dense(2)]), torch_net(), rows())


def test_two_networks_in_pytorch():
    report = compare_models(torch_net(), torch_net(momentum=0.5), rows(), rtol=RTOL)
    assert report.first_difference[:2] == ("running statistics", "1.norm mean")
    assert report.diagnosis == ("1.norm: momentum 0.9 against 0.5",)
