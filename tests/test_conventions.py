"""The presets: what they compute, and that they behave as immutable mappings."""

# pyright: reportCallIssue=true, reportUnnecessaryTypeIgnoreComment=true

import copy
import dataclasses
import pickle
from collections.abc import Mapping

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
from tests import oracle

# Statistics of order one from six values, in float32: ten roundings.
TOLERANCE = 1e-6

PRESETS = {name: getattr(jaxbn, name) for name in ("PYTORCH", "FLAX", "KERAS", "EXERCISE")}


def normal(shape):
    return (2 + 3 * np.random.default_rng(0).normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("preset", "momentum", "epsilon", "batch_variance", "running_variance"),
    [
        (jaxbn.PYTORCH, 0.9, 1e-5, "biased", "unbiased"),
        (jaxbn.FLAX, 0.99, 1e-5, "biased", "biased"),
        (jaxbn.KERAS, 0.99, 1e-3, "biased", "biased"),
        (jaxbn.EXERCISE, 0.9, 1e-5, "unbiased", "unbiased"),
    ],
    ids=PRESETS,
)
def test_preset(preset, momentum, epsilon, batch_variance, running_variance):
    x = normal((6, 3)) / 50  # of a variance that epsilon is no trifle beside
    params, state = jaxbn.init(x.shape)
    y, state = jaxbn.batch_norm(params, state, x, True, **preset)
    ddof = int(batch_variance == "unbiased")
    truth = oracle.batch_norm(x, x, epsilon=epsilon, ddof=ddof)
    assert oracle.error(y, truth.y) <= TOLERANCE
    tracked = truth.var * (6 / 5 if running_variance == "unbiased" else 1)
    assert oracle.error(state["mean"], (1 - momentum) * truth.mean) <= TOLERANCE
    assert oracle.error(state["var"], momentum + (1 - momentum) * tracked) <= TOLERANCE


def test_pytorch_is_the_default():
    x = normal((6, 3))
    params, state = jaxbn.init(x.shape)
    plain = jaxbn.batch_norm(params, state, x, True)
    splatted = jaxbn.batch_norm(params, state, x, True, **jaxbn.PYTORCH)
    jax.tree.map(np.testing.assert_array_equal, plain, splatted)


def test_type_checkers_see_into_presets():
    # Pyright reports a comment that silences nothing.
    x = normal((6, 3))
    with pytest.raises(TypeError, match="multiple values for keyword argument 'momentum'"):
        jaxbn.batch_norm({}, None, x, True, momentum=0.5, **jaxbn.KERAS)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="multiple values for keyword argument 'epsilon'"):
        jaxbn.linen.BatchNorm(epsilon=0.1, **jaxbn.KERAS)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        jaxbn.init(x.shape, **jaxbn.KERAS)  # pyright: ignore[reportCallIssue]


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        jaxbn.FLAX["momentum"] = 0.5
    with pytest.raises(dataclasses.FrozenInstanceError):
        jaxbn.FLAX.momentum = 0.5
    assert jaxbn.FLAX["momentum"] == 0.99


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
class TestMapping:
    def test_it_equals_the_dict(self, preset):
        plain = dict(preset)
        assert list(plain) == ["momentum", "epsilon", "batch_variance", "running_variance"]
        assert isinstance(preset, Mapping) and len(preset) == 4
        assert preset == plain and plain == preset
        assert preset != {**plain, "momentum": 0.5}
        assert [other for other in PRESETS.values() if other == preset] == [preset]
        assert {**preset} == plain
        assert "axis" not in preset and preset.get("axis") is None
        with pytest.raises(KeyError, match="axis"):
            preset["axis"]

    def test_merging_gives_a_dict(self, preset):
        changed = {**preset, "momentum": 0.5}
        for merged in (preset | {"momentum": 0.5}, {"momentum": 0.7} | preset | {"momentum": 0.5}):
            assert type(merged) is dict and merged == changed
        assert {"momentum": 0.5, "axis": 1} | preset == {**preset, "axis": 1}
        assert preset | jaxbn.KERAS == jaxbn.KERAS
        with pytest.raises(TypeError):
            _ = preset | 3

    @pytest.mark.parametrize(
        "again",
        [copy.copy, copy.deepcopy, lambda preset: pickle.loads(pickle.dumps(preset))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_copies_are_equal_presets(self, preset, again):
        found = again(preset)
        assert type(found) is type(preset)
        assert found == preset and hash(found) == hash(preset)
        assert {preset: 1}[found] == 1


def test_repr():
    assert repr(jaxbn.KERAS) == (
        "Convention(momentum=0.99, epsilon=0.001, batch_variance='biased', "
        "running_variance='biased')"
    )


def test_hashes_tell_presets_apart():
    assert len(set(PRESETS.values())) == 4


def test_default_of_a_field():
    @dataclasses.dataclass
    class Config:
        convention: Mapping = jaxbn.KERAS

    assert dataclasses.asdict(Config())["convention"] == jaxbn.KERAS


def test_attribute_of_a_linen_module():
    class Block(nn.Module):
        convention: Mapping = jaxbn.EXERCISE

        @nn.compact
        def __call__(self, x):
            return jaxbn.linen.BatchNorm(use_running_average=False, **self.convention)(x)

    x = normal((6, 3))
    for block, preset in ((Block(), jaxbn.EXERCISE), (Block(jaxbn.KERAS), jaxbn.KERAS)):
        y, _ = block.init_with_output(jax.random.key(0), x)
        assert hash(block) == hash(block.clone())
        assert pickle.loads(pickle.dumps(preset)) == block.convention
        variables = block.init(jax.random.key(0), x)
        y, _ = jax.jit(lambda v, x, block=block: block.apply(v, x, mutable="batch_stats"))(
            variables, x
        )
        wanted = oracle.batch_norm(
            x, x, epsilon=preset["epsilon"], ddof=int(preset["batch_variance"] == "unbiased")
        )
        assert oracle.error(y, wanted.y) <= TOLERANCE
