"""Comparing two networks: the first difference is at the planted fault."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxbn
import jaxbn.linen
from jaxbn.parity import compare_models
from jaxbn.parity._networks.linen import LinenNetwork
from jaxbn.parity._networks.network import cotangent_of
from jaxbn.parity._networks.options import CallOptions
from tests.raises import raises
from tests.small_networks import NAMES, WIDTHS, Block, Net, images, net, torch_net, variables_of


@pytest.fixture
def theirs(x64):
    return torch_net()


def place(report):
    return None if report.first_difference is None else report.first_difference[:2]


def test_equal_networks_agree(theirs):
    report = compare_models(net().bind(variables_of(theirs)), theirs, images(), NAMES, rtol=1e-10)
    assert report.ok, str(report)
    forward = [*NAMES, "(output)"]
    backward = [*reversed(NAMES), "(input)"]
    assert [row[:2] for row in report.rows] == [
        *(("evaluation forward", name) for name in forward),
        *(("training forward", name) for name in forward),
        *(
            ("running statistics", f"{name} {which}")
            for name in ("bn1", "block/bn")
            for which in ("mean", "var")
        ),
        *(("evaluation backward", name) for name in backward),
        *(("training backward", name) for name in backward),
    ]


def test_equal_networks_agree_in_float32():
    theirs = torch_net(torch.float32)
    report = compare_models((net(), variables_of(theirs)), theirs, images(np.float32), NAMES)
    assert report.ok, str(report)
    # Rounding errors show that it ran in float32.
    assert max(row.relative for row in report.rows) > 1e-9


def test_gradients_are_those_with_respect_to_the_intermediates(theirs):
    """The rows compare two frameworks; this checks one of them against finite differences."""
    x = images()
    model, variables = net(), variables_of(theirs)
    network = LinenNetwork("Flax", model, variables, CallOptions(None, None))
    found = network.run(["bn1"], x, train=True)
    cotangent = cotangent_of(found.values["(output)"].shape)
    direction = np.random.default_rng(3).normal(size=found.values["bn1"].shape)

    def loss(step):
        def shift(call, args, kwargs, context):
            y = call(*args, **kwargs)
            return y + step * direction if context.module.path == ("bn1",) else y

        with nn.intercept_methods(shift):
            y, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return float(jnp.sum(y * cotangent))

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert np.sum(found.gradients["bn1"] * direction) == pytest.approx(slope, rel=1e-6)


RATIO = "n/(n-1) = 32/31"
FAULTS = {
    "epsilon": (
        {"norm2": {"epsilon": 1e-3}},
        ("evaluation forward", "block/bn"),
        ("block/bn: epsilon 1e-3 against 1e-5",),
    ),
    "biased running variance": (
        {"norm1": {"running_variance": "biased"}},
        ("running statistics", "bn1 var"),
        (f"bn1: running variance differs by {RATIO}: biased against unbiased",),
    ),
    "momentum": (
        {"norm2": {"momentum": 0.1}},
        ("running statistics", "block/bn mean"),
        ("block/bn: momentum 0.1 against 0.9: the two definitions of momentum, m and 1 - m",),
    ),
    "unbiased batch variance": (
        {"norm2": {"batch_variance": "unbiased"}},
        ("training forward", "block/bn"),
        (f"block/bn: batch variance differs by {RATIO}: unbiased against biased",),
    ),
    "no relu": ({"relu": False}, ("evaluation forward", "block"), ()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_difference_is_at_the_fault(theirs, fault):
    options, expected, diagnosis = FAULTS[fault]
    model = net(**options)
    report = compare_models((model, variables_of(theirs)), theirs, images(), NAMES, rtol=1e-9)
    assert place(report) == expected
    assert report.diagnosis == diagnosis
    with raises(AssertionError, str(report)):
        report.raise_if_different()
    assert f"The first difference is at {expected[0]}, {expected[1]}: " in str(report)


def test_a_transposed_kernel(theirs):
    variables = variables_of(theirs)
    conv = variables["params"]["block"]["conv"]
    conv["kernel"] = conv["kernel"].transpose(1, 0, 2, 3)
    report = compare_models((net(), variables), theirs, images(), NAMES)
    assert place(report) == ("evaluation forward", "block/conv")
    assert report.diagnosis == (
        "block/bn: block/conv differs before it does",
        "block/bn: no difference on the same input",
    )


def test_a_fault_in_the_backward_pass_alone(theirs):
    class Stopped(Net):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(WIDTHS[0], (3, 3), padding=1, name="conv1")(x)
            x = nn.relu(jaxbn.linen.BatchNorm(not train, name="bn1", **jaxbn.PYTORCH)(x))
            x = 2 * x - jax.lax.stop_gradient(x)
            x = Block({}, name="block")(x, train)
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    report = compare_models((Stopped({}, {}), variables_of(theirs)), theirs, images(), NAMES)
    assert place(report) == ("evaluation backward", "bn1")
    assert report.diagnosis == ()


def test_shapes_may_differ(theirs):
    variables = variables_of(theirs)
    head = variables["params"]["head"]
    head["kernel"], head["bias"] = head["kernel"][:, :2], head["bias"][:2]
    report = compare_models((net(classes=2), variables), theirs, images(), NAMES)
    assert place(report) == ("evaluation forward", "head")
    assert report.first_difference.note == "shape (4, 2) against (4, 3)"


def test_nan_is_a_difference(theirs):
    variables = variables_of(theirs)
    variables["params"]["block"]["conv"]["bias"] *= jnp.nan
    report = compare_models((net(), variables), theirs, images(), NAMES)
    assert place(report) == ("evaluation forward", "block/conv")
    assert report.first_difference.note == "not finite: candidate"
