"""Finding which layer of one network is which layer of another, from a run of each."""

import flax.linen as nn
import numpy as np
import pytest
import torch
from flax import nnx

from jaxbn.parity import match_names
from tests.raises import raises
from tests.small_networks import NAMES, images, net, torch_net, variables_of

LAYERS = {path: name for path, name in NAMES.items() if path != "block"}
X = np.ones((2, 6, 6, 3), np.float32)


@pytest.fixture
def theirs():
    return torch_net(torch.float32)


def test_layers_in_the_same_order(theirs):
    x, variables = images(np.float32), variables_of(theirs)
    assert match_names(net(), theirs, x) == LAYERS
    assert match_names(net().bind(variables), theirs, x) == LAYERS
    assert list(match_names((net(), variables), theirs, x)) == list(LAYERS)


class Residual(nn.Module):
    """Two residual blocks, which compute their shortcuts first."""

    @nn.compact
    def __call__(self, x, is_training):
        for i in range(2):
            shortcut = nn.Conv(8, (1, 1), name=f"shortcut{i}")(x)
            shortcut = nn.BatchNorm(not is_training, name=f"shortcut_bn{i}")(shortcut)
            for k in range(2):
                x = nn.Conv(8, (3, 3), name=f"conv{i}{k}")(x)
                x = nn.BatchNorm(not is_training, name=f"bn{i}{k}")(x)
                x = nn.relu(x) if k == 0 else x
            x = nn.relu(x + shortcut)
        return x


class TorchResidual(torch.nn.Module):
    """The same blocks, which compute their shortcuts last."""

    def __init__(self):
        super().__init__()
        self.relu = torch.nn.ReLU(inplace=True)
        self.blocks = torch.nn.ModuleList()
        for channels in (3, 8):
            block = torch.nn.Module()
            block.conv0 = torch.nn.Conv2d(channels, 8, 3, padding=1)
            block.conv1 = torch.nn.Conv2d(8, 8, 3, padding=1)
            block.shortcut = torch.nn.Conv2d(channels, 8, 1)
            for name in ("bn0", "bn1", "shortcut_bn"):
                setattr(block, name, torch.nn.BatchNorm2d(8))
            self.blocks.append(block)

    def forward(self, x):
        for block in self.blocks:
            y = block.bn1(block.conv1(self.relu(block.bn0(block.conv0(x)))))
            x = self.relu(y + block.shortcut_bn(block.shortcut(x)))
        return x


def test_a_shortcut_that_is_computed_first():
    """All norms have the same shape, so each follows the layer that it normalizes."""
    names = match_names(Residual(), TorchResidual(), X)
    assert names == {
        **{f"shortcut{i}": f"blocks.{i}.shortcut" for i in range(2)},
        **{f"shortcut_bn{i}": f"blocks.{i}.shortcut_bn" for i in range(2)},
        **{f"conv{i}{k}": f"blocks.{i}.conv{k}" for i in range(2) for k in range(2)},
        **{f"bn{i}{k}": f"blocks.{i}.bn{k}" for i in range(2) for k in range(2)},
    }
    back = match_names(TorchResidual(), Residual(), X)
    assert back == {other: name for name, other in names.items()}


class Everything(nnx.Module):
    """A layer of each kind, with kernels that the frameworks lay out differently."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            [
                nnx.Embed(7, 4, rngs=rngs),
                nnx.Conv(4, 8, (3,), feature_group_count=2, rngs=rngs),
                nnx.Conv(8, 16, (5,), feature_group_count=8, rngs=rngs),
                nnx.ConvTranspose(16, 6, (2,), rngs=rngs),
                nnx.ConvTranspose(6, 5, (2,), transpose_kernel=True, rngs=rngs),
                nnx.LayerNorm(5, rngs=rngs),
                nnx.LinearGeneral(5, (2, 3), rngs=rngs),
                nnx.LinearGeneral((2, 3), 4, axis=(-2, -1), rngs=rngs),
            ]
        )

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class TorchEverything(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.grouped = torch.nn.Conv1d(4, 8, 3, padding="same", groups=2)
        self.depthwise = torch.nn.Conv1d(8, 16, 5, padding="same", groups=8)
        self.up1 = torch.nn.ConvTranspose1d(16, 6, 2)
        self.up2 = torch.nn.ConvTranspose1d(6, 5, 2)
        self.norm = torch.nn.LayerNorm(5)
        self.dense1 = torch.nn.Linear(5, 6)
        self.dense2 = torch.nn.Linear(6, 4)

    def forward(self, x):
        x = self.embed(x).mT
        x = self.up2(self.up1(self.depthwise(self.grouped(x))))
        return self.dense2(self.dense1(self.norm(x.mT)))


def test_every_kind_of_layer():
    names = match_names(Everything(nnx.Rngs(0)), TorchEverything(), np.ones((2, 9), int))
    theirs = ["embed", "grouped", "depthwise", "up1", "up2", "norm", "dense1", "dense2"]
    assert names == {f"layers/{i}": name for i, name in enumerate(theirs)}


def test_a_layer_that_is_called_twice_has_one_counterpart():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3, name="dense")
            return nn.Dense(2, name="head")(dense(dense(x)))

    layer = torch.nn.Linear(3, 3)
    theirs = torch.nn.Sequential(layer, layer, torch.nn.Linear(3, 2))
    assert match_names(Twice(), theirs, np.ones((2, 3), np.float32)) == {"dense": "0", "head": "2"}


FLAX = (
    "Flax calls ..., bn1 (batch norm (4,)), block/conv (convolution (3, 3, 4, 6)), block/bn "
    "(batch norm (6,)), head (linear (6, 3))"
)


def test_a_layer_of_another_shape(theirs):
    theirs.head = torch.nn.Linear(6, 5)
    with raises(
        ValueError,
        f"head in Flax, linear (6, 3), has no counterpart in PyTorch. {FLAX}; PyTorch calls ..., "
        "bn1 (batch norm (4,)), block.conv (convolution (3, 3, 4, 6)), block.bn (batch norm (6,)), "
        "head (linear (6, 5)).",
    ):
        match_names(net(), theirs, images(np.float32))


def test_a_layer_that_is_missing(theirs):
    theirs.block.bn = torch.nn.Identity()
    with raises(
        ValueError,
        "block/bn in Flax, batch norm (6,) directly after convolution (3, 3, 4, 6), has no "
        "counterpart in PyTorch. Flax calls conv1 (convolution (3, 3, 3, 4)), "
        f"{FLAX.removeprefix('Flax calls ..., ')}; PyTorch calls conv1 (convolution (3, 3, 3, 4)), "
        "bn1 (batch norm (4,)), block.conv (convolution (3, 3, 4, 6)), head (linear (6, 3)).",
    ):
        match_names(net(), theirs, images(np.float32))


def test_a_layer_that_only_the_reference_has(theirs):
    theirs.block.relu = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(6))
    with raises(
        ValueError,
        "block.relu.1 in PyTorch, batch norm (6,), has no counterpart in Flax. "
        f"{FLAX}; PyTorch calls ..., bn1 (batch norm (4,)), block.conv (convolution (3, 3, 4, 6)), "
        "block.bn (batch norm (6,)), block.relu.1 (batch norm (6,)), head (linear (6, 3)).",
    ):
        match_names(net(), theirs, images(np.float32))


def test_networks_without_layers():
    with raises(
        ValueError,
        "neither network calls a submodule with parameters or statistics of its own, so there is "
        "nothing to match.",
    ):
        match_names(nn.Sequential([nn.relu]), torch.nn.ReLU(), X)
