"""Errors of `recalibrate` for bad input."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from tests.calibration import Chain, Norm, cut, data, initialized


def test_errors():
    x = data()
    network, variables = initialized(Chain, x)
    run = partial(recalibrate, network, variables, train=True)
    with pytest.raises(ValueError) as error:
        run([])
    assert str(error.value) == "batches must hold at least one batch, got none."
    with pytest.raises(ValueError) as error:
        run([x[:50], np.where(x[50:] > 4, np.nan, x[50:])])
    assert str(error.value) == (
        "batches give statistics that are not finite in BatchNorm_0: look for NaN, infinity or "
        "values that overflow in them and in the weights."
    )
    with pytest.raises(ValueError) as error:
        run([x[0, :1]])
    assert str(error.value) == (
        "batches hold one value per feature in BatchNorm_0, which has no unbiased variance; give "
        "more values, or set running_variance='biased' in the layer or in recalibrate."
    )
    with pytest.raises(ValueError) as error:
        recalibrate(network, {"params": variables["params"]}, [x], train=True)
    assert str(error.value) == (
        "variables have no 'mean' and 'var' in BatchNorm_0. The running statistics are variables, "
        "too: in Linen, model.init makes 'batch_stats', which must be kept and saved with 'params'."
    )
    dense = nn.Dense(3)
    with pytest.raises(ValueError) as error:
        recalibrate(dense, dense.init(jax.random.key(0), x), [x])
    assert str(error.value) == (
        "model must call a batch norm of jaxbn.linen, flax.linen, jaxbn.nnx or flax.nnx that is "
        "not frozen, got a model that calls none."
    )
    with pytest.raises(TypeError) as error:
        recalibrate(network.apply, variables, [x])
    assert str(error.value) == (
        "model must be a flax.linen.Module, a flax.nnx.Module or a flax.nnx.GraphDef, got method."
    )
    with pytest.raises(TypeError) as error:
        recalibrate(network, x, [x])
    assert str(error.value) == ("variables of a flax.linen.Module must be a mapping, got ndarray.")
    layer = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError) as error:
        recalibrate(layer, {}, [x])
    assert str(error.value) == (
        "variables of an NNX model must be an nnx.State, such as nnx.state(model), got dict."
    )

    with pytest.raises(TypeError) as error:
        run({"x": x})
    assert str(error.value) == (
        "batches must be a list of batches, got a dict: put a single batch into a list."
    )


class Once:
    def __init__(self, batches):
        self.batches = iter(batches)

    def __iter__(self):
        return self.batches


def test_exhausted_batches():
    x = data()
    network, variables = initialized(Chain, x)
    with pytest.raises(ValueError) as error:
        recalibrate(network, variables, Once([x, x]), train=True)
    assert str(error.value) == (
        "batches were exhausted by the first pass over them: give a list, or an iterable that "
        "starts again with each iter()."
    )


@pytest.mark.parametrize("train", [True, False])
def test_one_layer_needs_only_one_pass(train):
    x, layer = data(shape=(10, 3)), Norm(use_running_average=not train)
    variables = layer.init(jax.random.key(0), x)
    got = recalibrate(layer, variables, Once(cut(x, [7, 3])))
    jax.tree.map(np.testing.assert_array_equal, got, recalibrate(layer, variables, cut(x, [7, 3])))


@pytest.mark.parametrize("train", [True, False])
def test_no_value(train):
    x, mask = data(shape=(10, 3)), np.zeros((10, 1), bool)
    layer = Norm(use_running_average=not train)
    variables = layer.init(jax.random.key(0), x)
    for batches in ([x[:0]], [x[:0], x[:0]], [{"x": x, "mask": mask}]):
        with pytest.raises(ValueError) as error:
            recalibrate(layer, variables, batches)
        assert str(error.value) == (
            "batches hold no values: they are empty, or entirely masked out."
        )


class Cell(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        return carry, Norm(use_running_average=False)(x)


class Steps(nn.Module):
    """A layer in a loop of Flax, with statistics that are carried from step to step, or shared."""

    how: str

    @nn.compact
    def __call__(self, x):
        options = {
            "carried": {"variable_carry": "batch_stats", "variable_broadcast": "params"},
            "shared": {"variable_broadcast": ["params", "batch_stats"]},
        }
        cell = nn.scan(Cell, **options[self.how], split_rngs={"params": False}, in_axes=1)
        return cell(name="cell")(None, x)


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = Cell(name="cell")
        return nn.cond(x.sum() > 0, lambda cell, x: cell(None, x)[1], lambda _, x: x, cell, x)


class Loop(nnx.Module):
    def __init__(self):
        self.norm = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return nnx.fori_loop(0, 3, lambda _, carry: (carry[0], carry[0](carry[1])), (self.norm, x))


CARRIED = {
    "nn.scan, carried": partial(Steps, "carried"),
    "nn.scan, shared": partial(Steps, "shared"),
    "nn.cond": Branch,
    "nnx.fori_loop": Loop,
}


@pytest.mark.parametrize("name", CARRIED)
def test_calls_that_cannot_be_distinguished(name):
    x, model = data(shape=(5, 3, 4)), CARRIED[name]()
    if isinstance(model, nnx.Module):
        variables = nnx.state(model)
    else:
        step = Cell().init(jax.random.key(0), None, x[:, 0])
        variables = {kind: {"cell": tree} for kind, tree in step.items()}
    with pytest.raises(ValueError) as error:
        recalibrate(model, variables, [x])
    assert str(error.value) == (
        "model calls a batch norm inside a loop, branch or map that carries or shares its "
        "statistics, such as nn.scan with variable_carry='batch_stats', nn.cond or nnx.fori_loop, "
        "where its calls cannot be distinguished. Calibrate a model that has the same variables "
        "and uses Python's for and if there."
    )
