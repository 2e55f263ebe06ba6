"""Comparing two networks: which layouts and dtypes are accepted, and which refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxbn.parity import compare_models
from tests.raises import raises
from tests.small_networks import NAMES, images, net, torch_net, variables_of


@pytest.fixture
def theirs(x64):
    return torch_net()


NCHW = (
    "x has shape (4, 3, 5, 5), with channels on axis 1, but must have them last, as Flax does: "
    "conv1 in {} takes 3 channels. Pass x.transpose(0, 2, 3, 1)."
)


def test_channels_first(theirs):
    ours, x = (net(), variables_of(theirs)), images().transpose(0, 3, 1, 2)
    for names in (None, NAMES):
        with raises(ValueError, NCHW.format("Flax")):
            compare_models(ours, theirs, x, names)
    with raises(ValueError, NCHW.format("PyTorch")):
        compare_models(theirs, ours, x)


@pytest.mark.parametrize("framework", ["Flax", "PyTorch"])
def test_channels_first_into_a_batch_norm(framework):
    theirs = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    ours = nn.Sequential([nn.BatchNorm(use_running_average=True)])
    ours = ours, ours.init(jax.random.key(0), np.ones((4, 5, 5, 3), np.float32))
    networks = (ours, theirs) if framework == "Flax" else (theirs, ours)
    name = {"Flax": "layers_0", "PyTorch": "0"}[framework]
    with raises(ValueError, NCHW.format(framework).replace("conv1", name)):
        compare_models(*networks, np.ones((4, 3, 5, 5), np.float32))


def test_a_batch_norm_whose_features_are_on_axis_1():
    theirs = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    ours = nn.Sequential([nn.BatchNorm(use_running_average=True, axis=1)])
    x = np.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype(np.float32)
    variables = ours.init(jax.random.key(0), x)
    report = compare_models((ours, variables), theirs, x, channels_first=())
    forward = next(row for row in report.rows if row.stage == "evaluation forward")
    assert forward.relative <= 1e-6, str(report)


def test_one_dimensional_arrays_that_channels_first_lacks():
    theirs = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3, padding=1))
    ours = nn.Sequential([nn.Conv(4, (3,), padding=1)])
    x = np.ones((3, 7, 2), np.float32)
    variables = ours.init(jax.random.key(0), x)
    with raises(
        ValueError,
        "0 in PyTorch takes 2 channels on axis 1, but got x of shape (3, 7, 2) unchanged, because "
        "3 is not in channels_first: pass channels_first=(3, 4, 5).",
    ):
        compare_models((ours, variables), theirs, x)


class Own(torch.nn.Module):
    """A layer of a user, with a weight of his own."""

    def __init__(self, forward, *shape, **buffers):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(shape))
        self.own_forward = forward
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.own_forward(self, x)


NTC, NHWC = np.ones((2, 7, 3), np.float32), np.ones((4, 5, 6, 3), np.float32)
ONES = {"running_mean": torch.ones(3), "running_var": torch.ones(3)}
UNUSUAL = {
    "an embedding": (
        Own(lambda self, x: torch.nn.functional.embedding(x, self.weight), 5, 3),
        np.array([[0, 1], [4, 2]]),
        (4, 5),
    ),
    "a kernel of three axes": (Own(lambda self, x: x @ self.weight.sum(0), 2, 3, 3), NTC, (4, 5)),
    "features last": (Own(lambda self, x: x - self.running_mean, 3, **ONES), NTC, (4, 5)),
    "a linear layer over time": (torch.nn.Linear(7, 2), NTC, (3, 4, 5)),
    "a linear layer over the width": (torch.nn.Linear(6, 2), NHWC, (4, 5)),
}


@pytest.mark.parametrize(("layer", "x", "channels_first"), UNUSUAL.values(), ids=UNUSUAL)
def test_unusual_layers_of_pytorch_are_accepted(layer, x, channels_first):
    models = (torch.nn.Sequential(layer) for _ in range(2))
    assert compare_models(*models, x, {"0": "0"}, channels_first=channels_first).ok


def test_a_linear_layer_of_pytorch_that_gets_channels_first():
    models = (torch.nn.Sequential(torch.nn.Linear(3, 2)) for _ in range(2))
    with raises(
        ValueError,
        "x has shape (2, 3, 5), with channels on axis 1, but must have them last, as Flax does: 0 "
        "in the candidate takes 3 channels. Pass x.transpose(0, 2, 1).",
    ):
        compare_models(*models, np.ones((2, 3, 5), np.float32))


def test_a_norm_of_flax_whose_features_are_on_axis_1():
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean, var = (self.variable("batch_stats", k, jnp.ones, 3) for k in ("mean", "var"))
            mean, var = (v.value[None, :, None, None] for v in (mean, var))
            return (x - mean) / jnp.sqrt(var)

    x = np.ones((2, 3, 5, 4), np.float32)
    networks = (Norm(), Norm().init(jax.random.key(0), x)), torch.nn.Sequential(torch.nn.Identity())
    report = compare_models(*networks, x, {"": ""})
    assert [row.relative for row in report.rows if row.name == "(output)"] == [1, 1]


def test_networks_in_bfloat16(rng):
    theirs = torch.nn.Sequential(torch.nn.Linear(3, 2)).bfloat16()
    kernel, bias = (jnp.bfloat16(p.detach().float().numpy().T) for p in theirs.parameters())
    params = {"layers_0": {"kernel": kernel, "bias": bias}}
    ours = nn.Sequential([nn.Dense(2)]), {"params": params}
    x = np.asarray(jnp.asarray(rng.normal(size=(8, 3)), jnp.bfloat16))
    # The output is rounded, and in a product and a sum a framework may round, too.
    report = compare_models(ours, theirs, x, rtol=8 * 2**-9)
    assert report.ok, str(report)


def test_integers_into_a_layer_of_pytorch(standard_promotion):
    x = np.ones((4, 3), np.int32)
    ours = nn.Sequential([nn.Dense(2)])
    variables = ours.init(jax.random.key(0), x)
    with raises(
        ValueError,
        "0 in PyTorch takes float64, but got int32: pass x.astype('float64').",
    ):
        compare_models((ours, variables), torch.nn.Sequential(torch.nn.Linear(3, 2)).double(), x)


def test_bfloat16_into_a_layer_of_pytorch():
    theirs = torch_net().float()
    with raises(
        ValueError,
        "the parameters in PyTorch are float32, but x is bfloat16: pass x.astype('float32'), or "
        "convert the model to bfloat16.",
    ):
        compare_models((net(), variables_of(theirs)), theirs, images().astype(jnp.bfloat16))


def test_dtypes_that_differ(theirs):
    ours = (net(), variables_of(theirs))
    with raises(
        ValueError,
        "the parameters in PyTorch are float64, but x is float32: pass x.astype('float64'), or "
        "convert the model to float32.",
    ):
        compare_models(ours, theirs, images(np.float32))
    with (
        jax.enable_x64(False),
        raises(
            ValueError,
            "the parameters in PyTorch are float64, but x is float32, since JAX's 64-bit types are "
            "off: call jax.config.update('jax_enable_x64', True) first, or compare in float32 with "
            "model.float().",
        ),
    ):
        compare_models(ours, theirs, images())
