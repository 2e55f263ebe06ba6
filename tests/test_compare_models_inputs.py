"""Comparing two networks: which networks and names are accepted, and which refused."""

import copy
import subprocess
import sys

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


def test_the_torch_model_is_not_changed(theirs):
    theirs.train()
    theirs.bn1.eval()
    before = copy.deepcopy(theirs.state_dict())
    compare_models((net(), variables_of(theirs)), theirs, images(), NAMES)
    assert theirs.training and not theirs.bn1.training
    assert all(parameter.grad is None for parameter in theirs.parameters())
    assert all(not module._forward_hooks for module in theirs.modules())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_one_dimensional_convolutions():
    class Conv(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Conv(4, (3,), padding=1, name="conv")(x)

    theirs = torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3, padding=1))
    variables = {
        "params": {
            "conv": {
                "kernel": jnp.asarray(theirs[0].weight.detach().numpy()).transpose(2, 1, 0),
                "bias": jnp.asarray(theirs[0].bias.detach().numpy()),
            }
        }
    }
    x = np.random.default_rng(0).normal(size=(3, 7, 2)).astype(np.float32)
    report = compare_models((Conv(), variables), theirs, x, {"conv": "0"}, channels_first=[3])
    assert report.ok, str(report)


def test_tokens_have_no_gradient():
    class Embed(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Embed(5, 3, name="embed")(x)

    theirs = torch.nn.Sequential(torch.nn.Embedding(5, 3))
    variables = {"params": {"embed": {"embedding": jnp.asarray(theirs[0].weight.detach().numpy())}}}
    report = compare_models(
        (Embed(), variables),
        theirs,
        np.array([[0, 1], [4, 2]]),
        {"embed": "0"},
        evaluation={"deterministic": True},
        training={"deterministic": False},
    )
    assert report.ok, str(report)
    assert "(input)" not in {row.name for row in report.rows}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"bn9": "bn1"},
            "each name must be called exactly once; calls in Flax: {'bn9': 0}. These are called "
            "once: ['block', 'block/bn', 'block/conv', 'bn1', 'conv1', 'head'].",
        ),
        (
            {"bn1": "norm"},
            "names has ['norm'], which PyTorch does not have; it has "
            "['block', 'block.bn', 'block.conv', 'block.relu', 'bn1', 'conv1', 'head'].",
        ),
    ],
)
def test_unknown_names(theirs, names, message):
    with raises(ValueError, message):
        compare_models((net(), variables_of(theirs)), theirs, images(), names)


def test_no_names(theirs):
    with raises(
        ValueError,
        "names is empty, so no intermediate and no running statistics would be compared; give at "
        "least one pair of a name in each network, such as {'block/bn': 'block.bn'}, or leave "
        "names out.",
    ):
        compare_models((net(), variables_of(theirs)), theirs, images(), {})


@pytest.mark.parametrize(
    ("names", "notes"),
    [
        (
            {"head": "head"},
            (
                "no running statistics were compared: names has no pair for Flax's "
                "['block/bn', 'bn1'] and PyTorch's ['block.bn', 'bn1']",
            ),
        ),
        (
            {"bn1": "bn1", "block": "block.bn"},
            (
                "not all running statistics were compared: names has no pair for Flax's "
                "['block/bn'] and PyTorch's ['block.bn']",
            ),
        ),
        ({"bn1": "bn1", "block/bn": "block.bn"}, ()),
    ],
    ids=["none", "some", "all"],
)
def test_statistics_that_are_not_compared_are_noted(theirs, names, notes):
    # Without a ReLU in either, the output of a block is that of its norm.
    model = net(norm2={"momentum": 0.5}, relu=False)
    theirs.block.relu = torch.nn.Identity()
    report = compare_models((model, variables_of(theirs)), theirs, images(), names)
    assert report.notes == notes
    assert all(f"({note})" in str(report) for note in notes)
    # The different momentum is noticed only if the statistics are compared.
    assert report.ok == bool(notes)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("made_there", [False, True])
def test_gradients_are_compared_if_torch_has_them_turned_off(mode, made_there, theirs):
    with getattr(torch, mode)():
        other = torch_net() if made_there else theirs
        model = net().bind(variables_of(other))
        report = compare_models(model, other, images(), NAMES, rtol=1e-10)
    assert report.ok, str(report)
    assert [row.name for row in report.rows if row.stage == "training backward"] == [
        *reversed(NAMES),
        "(input)",
    ]


def test_a_module_that_is_called_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            dense = nn.Dense(2, name="dense")
            return dense(dense(x))

    x = np.ones((3, 2), np.float32)
    variables = Twice().init(jax.random.key(0), x, train=True)
    with pytest.raises(ValueError, match=r"calls in Flax: \{'dense': 2\}"):
        compare_models((Twice(), variables), torch.nn.Linear(2, 2), x, {"dense": ""})


def test_an_output_that_is_not_a_single_array():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return x, nn.Dense(2, name="dense")(x)

    x = np.ones((3, 2), np.float32)
    variables = Pair().init(jax.random.key(0), x, train=True)
    with raises(
        TypeError, "only single arrays can be compared; in Flax, (output) returns a tuple."
    ):
        compare_models((Pair(), variables), torch.nn.Linear(2, 2), x, {"dense": ""})


def test_a_module_without_variables(theirs):
    with raises(
        TypeError,
        "candidate must be a bound Linen module, model.bind(variables), or the pair (model, "
        "variables); got a Net without variables.",
    ):
        compare_models(net(), theirs, images(), NAMES)


def test_the_tools_need_neither_flax_nor_torch_to_be_imported():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['flax'] = None; import jaxbn.parity; "
        "print(jaxbn.parity.compare_models.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "compare_models\n"


def test_names_that_are_a_list(theirs):
    with raises(
        TypeError,
        "names must be a mapping from the candidate's names to the reference's, such as "
        "{'block/bn': 'block.bn'}, got list.",
    ):
        compare_models((net(), variables_of(theirs)), theirs, images(), ["bn1"])


class ModeInOptions(nn.Module):
    """A network that takes its mode in arguments without names, so that no default is found."""

    otherwise: bool

    @nn.compact
    def __call__(self, x, **options):
        train = options.get("train", self.otherwise)
        return nn.BatchNorm(not train, momentum=0.9, name="norm")(x)


@pytest.mark.parametrize("otherwise", [False, True])
def test_a_network_that_does_not_follow_the_mode_is_noted(otherwise):
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    x = np.random.default_rng(0).normal(1, 2, size=(8, 3)).astype(np.float32)
    model = ModeInOptions(otherwise)
    compared = (model, model.init(jax.random.key(0), x)), theirs, x, {"norm": "0"}
    report = compare_models(*compared)
    assert report.first_difference.stage == f"{'evaluation' if otherwise else 'training'} forward"
    assert report.notes == (
        "Flax's running statistics are the same after training as after evaluation: its norms are "
        "frozen, or do not follow the mode (that of a Flax model can be set by the arguments "
        "evaluation and training)",
    )
    told = {"evaluation": {"train": False}, "training": {"train": True}}
    assert compare_models(*compared, **told).notes == ()


def test_a_norm_that_exists_in_training_alone():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            if train:
                nn.BatchNorm(False, use_scale=False, use_bias=False, name="extra")(x)
            return nn.BatchNorm(not train, momentum=0.9, name="norm")(x)

    x = np.random.default_rng(0).normal(1, 2, size=(8, 3)).astype(np.float32)
    model = Net()
    variables = model.init(jax.random.key(0), x, train=False)
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    report = compare_models((model, variables), theirs, x, {"norm": "0"})
    assert report.notes == (
        "not all running statistics were compared: names has no pair for Flax's ['extra']",
    )
