"""Comparing two networks: the first place where they part is the place of the planted fault."""

import copy
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxbn
import jaxbn.linen
from jaxbn.parity import compare_models

WIDTHS = (4, 6)
NAMES = {
    "conv1": "conv1",
    "bn1": "bn1",
    "block/conv": "block.conv",
    "block/bn": "block.bn",
    "block": "block",
    "head": "head",
}


class Block(nn.Module):
    norm: dict
    relu: bool = True

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(WIDTHS[1], (3, 3), padding=1, name="conv")(x)
        x = jaxbn.linen.BatchNorm(not train, name="bn", **{**jaxbn.PYTORCH, **self.norm})(x)
        return nn.relu(x) if self.relu else x


class Net(nn.Module):
    """With the options of each fault."""

    norm1: dict
    norm2: dict
    relu: bool = True
    classes: int = 3

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(WIDTHS[0], (3, 3), padding=1, name="conv1")(x)
        norm = jaxbn.linen.BatchNorm(not train, name="bn1", **{**jaxbn.PYTORCH, **self.norm1})
        x = nn.relu(norm(x))
        x = Block(self.norm2, self.relu, name="block")(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


def net(norm1=(), norm2=(), **options):
    return Net({"use_bias": True, **dict(norm1)}, {"use_bias": True, **dict(norm2)}, **options)


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(WIDTHS[0], WIDTHS[1], 3, padding=1)
        self.bn = torch.nn.BatchNorm2d(WIDTHS[1])
        # In place, as most networks have it: what the norm gave is overwritten.
        self.relu = torch.nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class TorchNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(WIDTHS[0])
        self.block = TorchBlock()
        self.head = torch.nn.Linear(WIDTHS[1], 3)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(self.block(x).mean((2, 3)))


def torch_net(dtype=torch.float64):
    """With values that differ from each other and from the initial ones."""
    model = TorchNet().to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.5, generator=generator)
    return model


def variables_of(model):
    """The same in Flax's layout."""

    def array(tensor):
        return jnp.asarray(tensor.detach().numpy())

    variables = {"params": {}, "batch_stats": {}}
    for path, name in NAMES.items():
        module = model.get_submodule(name)
        params, stats = {}, {}
        if isinstance(module, torch.nn.Conv2d):
            params = {"kernel": array(module.weight).transpose(2, 3, 1, 0)}
        elif isinstance(module, torch.nn.Linear):
            params = {"kernel": array(module.weight).T}
        elif isinstance(module, torch.nn.BatchNorm2d):
            params = {"scale": array(module.weight)}
            stats = {"mean": array(module.running_mean), "var": array(module.running_var)}
        else:
            continue
        params["bias"] = array(module.bias)
        for collection, leaves in (("params", params), ("batch_stats", stats)):
            if leaves:
                *parents, last = path.split("/")
                node = variables[collection]
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = leaves
    return variables


def images(dtype=np.float64):
    return np.random.default_rng(2).normal(size=(4, 5, 5, 3)).astype(dtype)


@pytest.fixture
def theirs(x64):
    return torch_net()


def place(report):
    return None if report.first_difference is None else report.first_difference[:2]


def test_equal_networks_agree(theirs):
    report = compare_models(net().bind(variables_of(theirs)), theirs, NAMES, images(), rtol=1e-10)
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
    report = compare_models((net(), variables_of(theirs)), theirs, NAMES, images(np.float32))
    assert report.ok, str(report)
    # Rounding shows, so float32 it was.
    assert max(row.relative for row in report.rows) > 1e-9


def test_gradients_are_those_with_respect_to_the_intermediates(theirs):
    """The rows compare the two frameworks; here one of them is held against finite differences."""
    from jaxbn.parity._models import _cotangent, _run_flax

    x = images()
    model, variables = net(), variables_of(theirs)
    found = _run_flax(model, variables, ["bn1"], x, {"train": True})
    cotangent = _cotangent(found.values["(output)"].shape)
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


FAULTS = {
    "epsilon": ({"norm2": {"epsilon": 1e-3}}, ("evaluation forward", "block/bn")),
    "biased running variance": (
        {"norm1": {"running_variance": "biased"}},
        ("running statistics", "bn1 var"),
    ),
    "momentum": ({"norm2": {"momentum": 0.1}}, ("running statistics", "block/bn mean")),
    "unbiased batch variance": (
        {"norm2": {"batch_variance": "unbiased"}},
        ("training forward", "block/bn"),
    ),
    "no relu": ({"relu": False}, ("evaluation forward", "block")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_first_place_is_the_faults(theirs, fault):
    options, expected = FAULTS[fault]
    model = net(**options)
    report = compare_models((model, variables_of(theirs)), theirs, NAMES, images(), rtol=1e-9)
    assert place(report) == expected
    with pytest.raises(AssertionError) as error:
        report.raise_if_different()
    assert str(error.value) == str(report)
    assert f"They part at {expected[0]}, {expected[1]}: " in str(report)


def test_a_transposed_kernel(theirs):
    variables = variables_of(theirs)
    conv = variables["params"]["block"]["conv"]
    conv["kernel"] = conv["kernel"].transpose(1, 0, 2, 3)
    report = compare_models((net(), variables), theirs, NAMES, images())
    assert place(report) == ("evaluation forward", "block/conv")


def test_a_fault_of_the_backward_pass_alone(theirs):
    class Stopped(Net):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(WIDTHS[0], (3, 3), padding=1, name="conv1")(x)
            x = nn.relu(jaxbn.linen.BatchNorm(not train, name="bn1", **jaxbn.PYTORCH)(x))
            x = 2 * x - jax.lax.stop_gradient(x)
            x = Block({}, name="block")(x, train)
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    report = compare_models((Stopped({}, {}), variables_of(theirs)), theirs, NAMES, images())
    assert place(report) == ("evaluation backward", "bn1")


def test_shapes_that_differ_part(theirs):
    variables = variables_of(theirs)
    head = variables["params"]["head"]
    head["kernel"], head["bias"] = head["kernel"][:, :2], head["bias"][:2]
    report = compare_models((net(classes=2), variables), theirs, NAMES, images())
    assert place(report) == ("evaluation forward", "head")
    assert report.first_difference.note == "shape (4, 2) against (4, 3)"


def test_nan_parts(theirs):
    variables = variables_of(theirs)
    variables["params"]["block"]["conv"]["bias"] *= jnp.nan
    report = compare_models((net(), variables), theirs, NAMES, images())
    assert place(report) == ("evaluation forward", "block/conv")
    assert report.first_difference.note == "not finite: candidate"


def test_the_torch_model_stays_as_it_is(theirs):
    theirs.train()
    theirs.bn1.eval()
    before = copy.deepcopy(theirs.state_dict())
    compare_models((net(), variables_of(theirs)), theirs, NAMES, images())
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
    report = compare_models((Conv(), variables), theirs, {"conv": "0"}, x, channels_first=[3])
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
        {"embed": "0"},
        np.array([[0, 1], [4, 2]]),
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
            "each name must be called once; calls in Flax: {'bn9': 0}. Called once are "
            "['block', 'block/bn', 'block/conv', 'bn1', 'conv1', 'head'].",
        ),
        (
            {"bn1": "norm"},
            "names has ['norm'], which the PyTorch model does not have; it has "
            "['block', 'block.bn', 'block.conv', 'block.relu', 'bn1', 'conv1', 'head'].",
        ),
    ],
)
def test_unknown_names(theirs, names, message):
    with pytest.raises(ValueError) as error:
        compare_models((net(), variables_of(theirs)), theirs, names, images())
    assert str(error.value) == message


def test_no_names(theirs):
    with pytest.raises(ValueError) as error:
        compare_models((net(), variables_of(theirs)), theirs, {}, images())
    assert str(error.value) == (
        "names is empty, so no intermediate and no running statistics would be compared; give at "
        "least one pair of a path in Flax and a name in PyTorch, such as "
        "{'block/bn': 'block.bn'}."
    )


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
    # Without a ReLU in either, a block gives what its norm gives.
    model = net(norm2={"momentum": 0.5}, relu=False)
    theirs.block.relu = torch.nn.Identity()
    report = compare_models((model, variables_of(theirs)), theirs, names, images())
    assert report.notes == notes
    assert all(f"({note})" in str(report) for note in notes)
    # The other momentum shows where the statistics are compared.
    assert report.ok == bool(notes)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("made_there", [False, True])
def test_gradients_are_compared_where_torch_has_them_turned_off(mode, made_there, theirs):
    with getattr(torch, mode)():
        other = torch_net() if made_there else theirs
        model = net().bind(variables_of(other))
        report = compare_models(model, other, NAMES, images(), rtol=1e-10)
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
        compare_models((Twice(), variables), torch.nn.Linear(2, 2), {"dense": ""}, x)


def test_what_gives_no_single_array():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return x, nn.Dense(2, name="dense")(x)

    x = np.ones((3, 2), np.float32)
    variables = Pair().init(jax.random.key(0), x, train=True)
    with pytest.raises(TypeError) as error:
        compare_models((Pair(), variables), torch.nn.Linear(2, 2), {"dense": ""}, x)
    assert str(error.value) == (
        "only single arrays can be compared; in Flax, (output) gives a tuple."
    )


def test_a_module_without_variables(theirs):
    with pytest.raises(TypeError) as error:
        compare_models(net(), theirs, NAMES, images())
    assert str(error.value) == (
        "flax_model must be a bound Linen module, model.bind(variables), or the pair (model, "
        "variables); got a Net without variables."
    )


def test_the_tools_need_neither_flax_nor_torch_to_be_imported():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['flax'] = None; import jaxbn.parity; "
        "print(jaxbn.parity.compare_models.__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "compare_models\n"
