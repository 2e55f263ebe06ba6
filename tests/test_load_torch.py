"""Flax models compute what PyTorch's do, once their state dicts are loaded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.convert import load_torch, variables_from_torch
from tests.conversion import assert_same
from tests.loading import (
    CASES,
    TOLERANCE,
    features_last,
    random_input,
    run_torch,
    with_random_weights,
)


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def linen_variables(case, state_dict):
    x = jax.ShapeDtypeStruct(features_last(random_input(case.shape)).shape, jnp.float32)
    told = {} if case.transpose_kernel is None else {"": case.transpose_kernel}
    variables = jax.eval_shape(case.linen.init, jax.random.key(0), x)
    return variables_from_torch(state_dict, {"": ""}, variables, transpose_kernel=told)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_layer(x64, case):
    theirs, x = with_random_weights(case.torch()), random_input(case.shape)
    variables = linen_variables(case, theirs.state_dict())
    assert_close(case.linen.apply(variables, features_last(x)), run_torch(theirs, x))

    ours = case.nnx(nnx.Rngs(0))
    load_torch(ours, theirs.state_dict(), {"": ""})
    arrays = nnx.to_pure_dict(nnx.state(ours, (nnx.Param, nnx.BatchStat)))
    assert_same(arrays, {k: v for tree in variables.values() for k, v in tree.items()})


class Theirs(torch.nn.Module):
    """A network of several kinds of layers, one of them after a flattening, and a shared one."""

    def __init__(self):
        super().__init__()
        self.token = torch.nn.Parameter(torch.zeros(4))
        self.conv = torch.nn.Conv2d(3, 4, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(4, momentum=None)
        self.blocks = torch.nn.ModuleList([torch.nn.Conv2d(4, 4, 1), torch.nn.BatchNorm2d(4)])
        self.relu = torch.nn.ReLU()
        self.flat_norm = torch.nn.BatchNorm1d(4 * 2 * 3)
        self.fc = torch.nn.Linear(4 * 2 * 3, 5)
        self.shared = torch.nn.Linear(5, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x))) + self.token[:, None, None]
        for block in self.blocks:
            x = block(x)
        x = self.fc(self.flat_norm(x.flatten(1)))
        return self.shared(self.shared(x))


class Linen(nn.Module):
    """The same network."""

    def setup(self):
        self.token = self.param("token", nn.initializers.zeros, (4,))
        self.conv = nn.Conv(4, (3, 3), padding="VALID", use_bias=False)
        self.norm = jaxbn.linen.BatchNorm(True, epsilon=1e-5, momentum=None)
        self.blocks = [nn.Conv(4, (1, 1)), nn.BatchNorm(True, epsilon=1e-5)]
        self.flat_norm = nn.BatchNorm(True, epsilon=1e-5)
        self.fc, self.shared = nn.Dense(5), nn.Dense(5)

    def __call__(self, x):
        x = nn.relu(self.norm(self.conv(x))) + self.token
        for block in self.blocks:
            x = block(x)
        x = self.fc(self.flat_norm(x.reshape(len(x), -1)))
        return self.shared(self.shared(x))


class Nnx(nnx.Module):
    """The same network."""

    def __init__(self, rngs):
        options = {"use_running_average": True, "epsilon": 1e-5, "rngs": rngs}
        self.token = nnx.Param(jnp.zeros(4))
        self.conv = nnx.Conv(3, 4, (3, 3), padding="VALID", use_bias=False, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(4, momentum=None, **options)
        self.blocks = nnx.List([nnx.Conv(4, 4, (1, 1), rngs=rngs), nnx.BatchNorm(4, **options)])
        self.flat_norm = nnx.BatchNorm(4 * 2 * 3, **options)
        self.fc = nnx.Linear(4 * 2 * 3, 5, rngs=rngs)
        self.shared = nnx.Linear(5, 5, rngs=rngs)
        self.again = self.shared
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        return Linen.__call__(self, x)


# "relu" stands for the modules without variables that a comparison names, too.
NAMES = {n: n for n in ("token", "conv", "norm", "relu", "flat_norm", "fc", "shared")}
LINEN_NAMES = NAMES | {"blocks_0": "blocks.0", "blocks_1": "blocks.1"}
NNX_NAMES = NAMES | {"blocks/0": "blocks.0", "blocks/1": "blocks.1"}
FLATTENED = {"flat_norm": (4, 2, 3), "fc": (4, 2, 3)}
X = random_input((2, 3, 4, 5))


def test_a_linen_model(x64):
    theirs, model = with_random_weights(Theirs()), Linen()
    initial = model.init(jax.random.key(0), features_last(X))
    variables = variables_from_torch(theirs.state_dict(), LINEN_NAMES, initial, flattened=FLATTENED)
    # PyTorch's layers all count batches. Only those variables that Flax has are there.
    assert jax.tree.structure(variables) == jax.tree.structure(initial)
    assert "count" in variables["batch_stats"]["norm"]
    assert_close(model.apply(variables, features_last(X)), theirs(torch.tensor(X)).detach().numpy())
    # Without the reordering, the shapes fit as well.
    variables = variables_from_torch(theirs.state_dict(), LINEN_NAMES, initial)
    with pytest.raises(AssertionError):
        y = model.apply(variables, features_last(X))
        assert_close(y, theirs(torch.tensor(X)).detach().numpy())


def test_an_nnx_model(x64):
    theirs, model = with_random_weights(Theirs()), Nnx(nnx.Rngs(0))
    load_torch(model, theirs.state_dict(), NNX_NAMES, flattened=FLATTENED)
    assert model.shared is model.again
    assert_close(model(features_last(X)), theirs(torch.tensor(X)).detach().numpy())


def test_an_abstract_nnx_model():
    theirs = with_random_weights(Theirs())
    abstract = nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))
    real = Nnx(nnx.Rngs(0))
    for model in (abstract, real):
        load_torch(model, theirs.state_dict(), NNX_NAMES, flattened=FLATTENED)
    kinds = (nnx.Param, nnx.BatchStat)
    assert_same(
        nnx.to_pure_dict(nnx.state(abstract, kinds)), nnx.to_pure_dict(nnx.state(real, kinds))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_files(tmp_path, dtype):
    """The values have the dtype of the file, and its bits."""
    theirs = with_random_weights(Theirs()).to(dtype)
    state_dict = theirs.state_dict()
    safetensors.torch.save_file(state_dict, tmp_path / "model.safetensors")
    initial = jax.eval_shape(Linen().init, jax.random.key(0), jnp.ones((2, 4, 5, 3)))
    variables = variables_from_torch(state_dict, LINEN_NAMES, initial, flattened=FLATTENED)
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    again = variables_from_torch(read, LINEN_NAMES, initial, flattened=FLATTENED)
    assert_same(variables, again)
    back = variables["params"]["conv"]["kernel"].transpose(3, 2, 0, 1)
    assert back.dtype.name == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(
        np.asarray(back, np.float64), state_dict["conv.weight"].double().numpy()
    )
    assert variables["batch_stats"]["norm"]["count"].dtype == jnp.int32


def test_no_memory_is_shared():
    theirs = with_random_weights(torch.nn.LayerNorm(4)).float()
    model = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    load_torch(model, theirs.state_dict(), {"": ""})
    before = np.array(model.scale[...])
    with torch.no_grad():
        theirs.weight += 1
    np.testing.assert_array_equal(model.scale[...], before)
