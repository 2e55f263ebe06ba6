"""Batch norms of any framework, put into Linen and NNX models."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import convert
from tests.conversion import FEATURES, assert_same, ignore_keras_warning, random_numbers
from tests.raises import raises

pytestmark = ignore_keras_warning

BOTH = ("scale", "bias")


class Linen(nn.Module):
    """Two batch norms, of which one counts, and a layer that is none."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="first")(x)
        x = nn.Dense(FEATURES, name="dense")(x)
        return jaxbn.linen.BatchNorm(True, momentum=None, use_bias=False, name="second")(x)


class Nnx(nnx.Module):
    """The same, and the first one is shared."""

    def __init__(self, rngs):
        self.first = nnx.BatchNorm(FEATURES, rngs=rngs)
        self.dense = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.second = jaxbn.nnx.BatchNorm(FEATURES, momentum=None, use_bias=False, rngs=rngs)
        self.again = self.first


def initial():
    return Linen().init(jax.random.key(0), jnp.ones((2, FEATURES)))


def layers(**replaced):
    given = {
        "bn1": random_numbers(BOTH, np.float32, seed=1),
        "bn2": random_numbers(("scale",), np.float32, seed=2),
    }
    return given | replaced


NAMES = {"first": "bn1", "second": "bn2", "dense": "fc"}


def test_into_linen():
    given, variables = layers(), initial()
    result = convert.put_batch_norms(variables, given, NAMES)
    assert jax.tree.structure(result) == jax.tree.structure(variables)
    assert_same(result["params"]["dense"], variables["params"]["dense"])
    del given["bn1"][1]["count"]
    for path, name in (("first", "bn1"), ("second", "bn2")):
        ours = result["params"][path], result["batch_stats"][path]
        assert_same(ours, given[name])
    assert_same(variables, initial())


@pytest.mark.parametrize("path", ["first", "again"])
def test_into_nnx(path):
    given, model = layers(), Nnx(nnx.Rngs(0))
    dense = np.array(model.dense.kernel[...])
    convert.load_batch_norms(model, given, {path: "bn1", "second": "bn2"})
    kinds = (nnx.Param, nnx.BatchStat)
    for layer, (params, state) in ((model.first, given["bn1"]), (model.second, given["bn2"])):
        found = nnx.to_pure_dict(nnx.state(layer, kinds))
        wanted = {**params, **state}
        if layer is model.first:
            del wanted["count"]
        assert_same(found, wanted)
    np.testing.assert_array_equal(model.dense.kernel[...], dense)


def test_names_are_paths_by_default():
    given = layers()
    given = {"first": given["bn1"], "second": given["bn2"]}
    wanted = convert.put_batch_norms(initial(), layers(), NAMES)
    assert_same(convert.put_batch_norms(initial(), given), wanted)


def test_kept():
    variables = initial()
    result = convert.put_batch_norms(variables, {"bn2": layers()["bn2"]}, NAMES, kept=["first"])
    assert_same(result["batch_stats"]["first"], variables["batch_stats"]["first"])
    assert_same(result["batch_stats"]["second"], layers()["bn2"][1])


def test_shapes_of_haiku():
    params, state = layers()["bn1"]
    theirs = convert.to_haiku(params, state, shape=(1, FEATURES, 1, 1))
    given = layers(bn1=convert.from_haiku(*theirs))
    wanted = convert.put_batch_norms(initial(), layers(), NAMES)
    assert_same(convert.put_batch_norms(initial(), given, NAMES), wanted)


def test_partitioned_variables_stay_in_their_boxes():
    init = nn.with_partitioning(nn.initializers.ones, ("features",))
    model = nn.BatchNorm(use_running_average=True, scale_init=init)
    variables = model.init(jax.random.key(0), jnp.ones((2, FEATURES)))
    result = convert.put_batch_norms(variables, {"": layers()["bn1"]})
    assert jax.tree.structure(result) == jax.tree.structure(variables)
    assert result["params"]["scale"].names == ("features",)
    assert_same(result["params"]["scale"].value, layers()["bn1"][0]["scale"])


def test_all_problems_are_listed():
    params, state = layers()["bn1"]
    wrong = ({**params, "scale": jnp.ones(3)}, {**state, "mean": jnp.ones(FEATURES, jnp.int32)})
    model = Nnx(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    without_count = {k: v for k, v in state.items() if k != "count"}
    given = {"bn1": wrong, "bn2": (params, without_count), "bn3": (params, state)}
    with raises(
        ValueError,
        "layers does not fit the batch norms of the model: no batch norm takes bias of "
        "layers['bn2']; no batch norm takes layers['bn3']; mean of layers['bn1'] has dtype int32, "
        "want a floating one; scale of layers['bn1'] has shape (3,), but again/scale has shape "
        "(5,); layers['bn2'] lacks 'count', for second/count.",
    ):
        convert.load_batch_norms(model, given, {"first": "bn1", "second": "bn2"})
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before)
    with raises(
        ValueError,
        "layers does not fit the batch norms of the model: kept has 'third', which the model does "
        "not have; names lacks 'second' (scale, mean, var, count); layers lacks 'bn4', for first; "
        "no batch norm takes layers['bn2'].",
    ):
        convert.put_batch_norms(
            initial(), {"bn2": layers()["bn2"]}, {"first": "bn4"}, kept=["third"]
        )


def test_a_misspelt_path_is_named():
    with raises(
        ValueError,
        "layers does not fit the batch norms of the model: names has paths at which the model has "
        "no variables: 'secnd'; names lacks 'second' (scale, mean, var, count); no batch norm "
        "takes layers['bn2'].",
    ):
        convert.put_batch_norms(initial(), layers(), {"first": "bn1", "secnd": "bn2"})


def test_wrong_types():
    with raises(TypeError, "layers must be a mapping, got list."):
        convert.put_batch_norms(initial(), [])
    with raises(TypeError, "layers['bn'] must be the pair (params, state), got 3."):
        convert.put_batch_norms(initial(), {"bn": 3})
    with raises(TypeError, "names must have strings as values, got 1."):
        convert.put_batch_norms(initial(), layers(), {"first": 1})
    with raises(TypeError, "kept must be a collection of strings, got 'first'."):
        convert.put_batch_norms(initial(), layers(), NAMES, kept="first")
    with raises(TypeError, "model must be a flax.nnx.Module, got dict."):
        convert.load_batch_norms({}, layers())
    with raises(
        ValueError,
        "variables must hold 'params' or 'batch_stats', as model.init returns them, got the keys "
        "['first'].",
    ):
        convert.put_batch_norms({"first": {}}, layers())
    with raises(
        ValueError,
        "names has 'first': 'bn2', but that layer is shared, and also has the name 'bn1'.",
    ):
        convert.load_batch_norms(Nnx(nnx.Rngs(0)), layers(), {"again": "bn1", "first": "bn2"})


def test_torch_counts_only_on_demand():
    state_dict = {f"bn.{k}": v for k, v in torch.nn.BatchNorm1d(FEATURES).state_dict().items()}
    for track_count in (True, False):
        converted = convert.batch_norms_from_torch(state_dict, track_count=track_count)
        state = converted["bn"][1]
        assert state is not None and ("count" in state) is track_count
        assert_same(convert.from_torch(state_dict, "bn", track_count=track_count), converted["bn"])
    with raises(ValueError, "track_count must be a Python bool, got 'no' of type str."):
        convert.from_torch(state_dict, "bn", track_count="no")


def batch_norm(seed, **options):
    layer = keras.layers.BatchNormalization(**options)
    layer.build((None, FEATURES))
    layer.set_weights(list(convert.to_keras(*random_numbers(BOTH, np.float32, seed)).values()))
    return layer


class Block(keras.layers.Layer):
    """A layer of a derived class, with layers in attributes and in a list."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm = batch_norm(3, name="norm")
        self.more = [batch_norm(4, name="norm"), keras.layers.ReLU()]

    def call(self, x):
        return self.more[1](self.more[0](self.norm(x)))


def keras_model():
    inner = keras.Sequential([batch_norm(1, name="norm"), keras.layers.ReLU()], name="inner")
    shared = batch_norm(2, name="norm")
    x = keras.Input((FEATURES,))
    return keras.Model(x, Block(name="block")(shared(inner(shared(x)))))


def test_keras_models():
    found = convert.batch_norms_from_keras(keras_model())
    seeds = {"inner/norm": 1, "norm": 2, "block/norm": 3, "block/norm_1": 4}
    assert found.keys() == seeds.keys()
    for path, seed in seeds.items():
        assert_same(found[path], random_numbers(BOTH, np.float32, seed, count=None))
    (own,) = convert.batch_norms_from_keras(batch_norm(5)).items()
    assert own[0] == ""


def test_keras_into_flax():
    keras_layers = convert.batch_norms_from_keras(keras_model())
    given = {"first": keras_layers["norm"], "second": keras_layers["inner/norm"]}
    model = nnx.Dict({name: nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0)) for name in given})
    convert.load_batch_norms(model, given)
    for name, (params, state) in given.items():
        found = nnx.to_pure_dict(nnx.state(model[name], (nnx.Param, nnx.BatchStat)))
        assert_same(found, {**params, **state})


def test_what_is_no_keras_model():
    with raises(
        TypeError, "model must be a keras.Model or a keras.layers.Layer, got builtins.dict."
    ):
        convert.batch_norms_from_keras({})
    model = keras.Sequential([keras.layers.BatchNormalization(name="norm")])
    with raises(
        ValueError,
        "model has batch norms that are not built; call it, or model.build(input_shape): 'norm'.",
    ):
        convert.batch_norms_from_keras(model)
