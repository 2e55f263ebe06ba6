"""What only PyTorch has: layers without state, whole models, and files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy
import safetensors.torch
import torch

import jaxbn
import jaxbn.linen
from jaxbn import convert
from tests import oracle
from tests.conversion import (
    EPSILON,
    FEATURES,
    Torch,
    assert_close,
    assert_same,
    batches,
    random_numbers,
)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_options(x64, affine, track, momentum):
    def layer():
        return torch.nn.BatchNorm2d(FEATURES, EPSILON, momentum, affine, track, dtype=torch.float64)

    theirs, other = layer(), layer()
    for x in batches(Torch.shape, seed=4, number=2):
        theirs(torch.tensor(x))
    params, state = convert.from_torch(theirs.state_dict())
    assert (bool(params), state is not None) == (affine, track)
    other.load_state_dict(convert.to_torch(params, state))
    ours = None if momentum is None else 1 - momentum
    for train in (True, True, False):
        for x in batches(Torch.shape, seed=5, number=2):
            y, state = jaxbn.batch_norm(
                params, state, x, train, axis=1, epsilon=EPSILON, momentum=ours
            )
            for module in (theirs, other):
                assert_close(y, module.train(train)(torch.tensor(x)).detach())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("prefix", ["", "net.bn", "net.bn."])
def test_bits(x64, dtype, prefix):
    layer = torch.nn.BatchNorm1d(FEATURES)
    for value in layer.state_dict().values():
        if value.ndim:
            value.copy_(torch.randn(FEATURES))
    layer.num_batches_tracked.fill_(70_000)
    layer = layer.to(getattr(torch, dtype))
    name = prefix and "net.bn."
    state_dict = {name + k: v for k, v in layer.state_dict().items()}
    params, state = convert.from_torch(state_dict, prefix)
    assert {v.dtype.name for v in params.values()} == {dtype}
    assert {v.dtype.name for v in state.values()} == {dtype, "int32"}
    assert int(state["count"]) == 70_000

    result = convert.to_torch(params, state, prefix)
    assert list(result) == list(state_dict)
    module = torch.nn.BatchNorm1d(FEATURES).to(getattr(torch, dtype))
    if prefix:
        module = torch.nn.ModuleDict({"net": torch.nn.ModuleDict({"bn": module})})
    loaded = module.load_state_dict(result, strict=True)
    assert not loaded.missing_keys and not loaded.unexpected_keys
    for key, value in module.state_dict().items():
        assert torch.clone(result[key]).dtype == value.dtype == state_dict[key].dtype
        assert torch.equal(value, state_dict[key])
    assert_same(convert.from_torch(result, prefix), (params, state))
    as_jax = {k: jnp.asarray(v) for k, v in result.items()}
    assert_same(convert.from_torch(as_jax, prefix), (params, state))


def test_torch_accepts_the_arrays_as_tensors():
    result = convert.to_torch(*random_numbers(("scale", "bias"), np.float32))
    for value in result.values():
        assert isinstance(value, np.ndarray)
        for make in (torch.from_numpy, torch.as_tensor, torch.tensor):
            np.testing.assert_array_equal(make(value).numpy(), value)
    layer = torch.nn.BatchNorm1d(FEATURES)
    layer.load_state_dict({k: torch.from_numpy(v) for k, v in result.items()}, assign=True)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), result["weight"])


def test_old_checkpoint():
    state_dict = torch.nn.BatchNorm1d(FEATURES).state_dict()
    del state_dict["num_batches_tracked"]
    params, state = convert.from_torch(state_dict)
    assert sorted(state) == ["mean", "var"]
    result = convert.to_torch(params, state)
    assert result["num_batches_tracked"].dtype == np.int64
    assert result["num_batches_tracked"] == 0


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, FEATURES, 3)
        self.bn = torch.nn.BatchNorm2d(FEATURES)

    def forward(self, x):
        return self.bn(self.conv(x))


def torch_model():
    return torch.nn.Sequential(
        Block(),
        torch.nn.Flatten(1),
        torch.nn.LayerNorm(80),
        torch.nn.BatchNorm1d(80, affine=False),
        torch.nn.Linear(80, 6),
        torch.nn.BatchNorm1d(6, track_running_stats=False),
    )


def test_a_whole_model(x64):
    model, other = torch_model().double(), torch_model().double()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(
                lambda module, x, y, name=name: seen.update({name: (x[0].detach(), y.detach())})
            )
    for x in batches((8, 3, 6, 6), seed=6):
        model(torch.tensor(x))
    layers = convert.batch_norms_from_torch(model.state_dict())
    assert list(layers) == ["0.bn", "3"]
    layers["5"] = convert.from_torch(model.state_dict(), "5")

    model.eval()(torch.tensor(batches((8, 3, 6, 6), seed=7)[0]))
    assert seen.keys() == layers.keys()
    for name, (params, state) in layers.items():
        x, y = (v.numpy() for v in seen[name])
        assert_close(jaxbn.batch_norm(params, state, x, False, axis=1)[0], y)

    state_dict = other.state_dict()
    for name, (params, state) in layers.items():
        state_dict |= convert.to_torch(params, state, name)
    other.load_state_dict(state_dict)
    for name in layers:
        a, b = (m.get_submodule(name).state_dict() for m in (model, other))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(model[4].weight, other[4].weight)

    (own,) = convert.batch_norms_from_torch(model[3].state_dict()).items()
    assert own[0] == ""
    assert_same(own[1], layers["3"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files(tmp_path, dtype):
    model = torch_model().to(dtype)
    expected = convert.batch_norms_from_torch(model.state_dict())
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for state_dict in (
        safetensors.numpy.load_file(tmp_path / "model.safetensors"),
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
        safetensors.flax.load_file(tmp_path / "model.safetensors"),
        safetensors.torch.load((tmp_path / "model.safetensors").read_bytes()),
        torch.load(tmp_path / "model.pt", weights_only=True),
    ):
        assert_same(convert.batch_norms_from_torch(state_dict), expected)

    params, state = expected["0.bn"]
    safetensors.numpy.save_file(convert.to_torch(params, state), tmp_path / "layer.safetensors")
    state_dict = safetensors.torch.load_file(tmp_path / "layer.safetensors")
    torch.nn.BatchNorm2d(FEATURES, dtype=dtype).load_state_dict(state_dict)
    assert_same(convert.from_torch(state_dict), (params, state))


def test_into_flax():
    theirs = Torch(("scale", "bias"), "float32")
    theirs.load(*random_numbers(("scale", "bias"), np.float32))
    (x,) = batches(Torch.shape, seed=8, number=1)
    x = x.astype(np.float32)
    layer = jaxbn.linen.BatchNorm(use_running_average=True, axis=1, epsilon=EPSILON)
    variables = layer.init(jax.random.key(0), x)
    params, state = convert.from_torch(theirs.layer.state_dict())
    variables = {**variables, "params": params, "batch_stats": state}
    # Each side rounds a value of order one about four times.
    tolerance = 4 * float(jnp.finfo(jnp.float32).eps)
    assert oracle.error(layer.apply(variables, x), theirs.run(x, False)) <= tolerance
