"""What `fold_linen` refuses to fold if it has the model, and why."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxbn.linen
from jaxbn.inference import find_pairs, fold_linen
from tests.fold_models import (
    CHANNELS,
    Block,
    OneScope,
    WithoutBias,
    conv,
    images,
    linen,
    norm,
    variables_of,
)
from tests.raises import raises


def relu_between(x):
    """As in torchcrepe's networks."""
    return norm()(nn.relu(conv()(x)))


def two_consumers(x):
    y = conv()(x)
    return norm()(y) + conv()(y)


def output_too(x):
    y = conv()(x)
    return norm()(y), y


def layer_called_twice(x):
    layer = conv()
    return norm()(layer(x)) + nn.sigmoid(layer(2 * x))


def norm_of_two_layers(x):
    shared = norm()
    return shared(conv()(x)) + shared(conv()(x))


def two_norms_of_one_layer(x):
    y = conv()(x)
    return norm()(y) * norm()(y)


def tied_kernel(x):
    dense = nn.Dense(CHANNELS, use_bias=False)
    y = norm()(dense(x))
    return y @ dense.variables["params"]["kernel"]


def scanned(x):
    axes = {"params": 0, "batch_stats": 0}
    return nn.scan(Block, axes, split_rngs={"params": True}, length=3)(name="blocks")(x)[0]


def mapped(x):
    axes = {"params": 0, "batch_stats": 0}
    blocks = nn.vmap(Block, axes, split_rngs={"params": True}, axis_size=2, in_axes=None)
    return blocks(name="blocks")(x)[0]


def derived_layer(x):
    class Doubled(nn.Conv):
        def __call__(self, x):
            return 2 * super().__call__(x)

    return norm()(Doubled(CHANNELS, (3, 3), name="conv")(x))


def in_vmap(x):
    layer, after = nn.Dense(CHANNELS), norm()
    return jax.vmap(lambda x: after(layer(x)), -2, -2)(x)


def equal_compiled_blocks(x):
    block = nn.jit(Block)
    return block()(block()(x)[0])[0]


def active_dropout(x):
    def dropout(x, rate=0.5):
        kept = jax.random.bernoulli(jax.random.key(0), 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), 0)

    return norm()(dropout(conv()(x)))


REFUSED = {
    (lambda x: norm()(WithoutBias(name="layer")(x))): "nothing can be folded into layer: it has no "
    "bias, and is not a layer of Flax",
    (lambda x: OneScope(name="block")(x)): "block shares its scope with another module "
    "(nn.share_scope)",
    in_vmap: "BatchNorm_0 is called inside a map: its input has the shape (2, 6, 4) in the call "
    "and (5, 2, 6, 4) in the model, as inside jax.vmap",
    equal_compiled_blocks: "JitBlock_1/BatchNorm_0 is compiled once and called 2 times, as are "
    "equal blocks of one nn.jit class",
    active_dropout: "div, an active dropout stand between Conv_0 and BatchNorm_0",
    relu_between: "relu stands between Conv_0 and BatchNorm_0",
    two_consumers: "the output of Conv_0 also goes to Conv_1",
    output_too: "the output of Conv_0 is also an output of the model",
    layer_called_twice: "Conv_0 is called 2 times",
    norm_of_two_layers: "BatchNorm_0 is called 2 times",
    tied_kernel: "the kernel of Dense_0 is also used by the output of the model",
    scanned: "blocks/BatchNorm_0 is called inside a loop, branch or map (scan)",
    mapped: "nothing can be folded into blocks/Conv_0: its kernel has the shape (3, 3, 4, 4) in "
    "the call and (2, 3, 3, 4, 4) among the variables, as inside nn.scan or nn.vmap",
    derived_layer: "mul stands between conv and BatchNorm_0",
    (lambda x: norm()(x)): "BatchNorm_0 follows no layer that has a kernel",
    (lambda x: norm(axis=1)(conv()(x))): "BatchNorm_0 has its features on axis=1 of an input with "
    "4 axes, and a layer has its features on the last",
    (lambda x: norm()(conv()(x), mask=jnp.ones((2, 1, 1, 1), bool))): "BatchNorm_0 is called with "
    "a mask",
    (lambda x: norm()(conv()(x).reshape(2, -1, CHANNELS))): "reshape stands between Conv_0 and "
    "BatchNorm_0",
    (lambda x: norm()(conv()(x) + nn.sigmoid(nn.tanh(x)))): "add stands between Conv_0 and "
    "BatchNorm_0",
    (lambda x: norm()(nn.max_pool(nn.relu(conv()(x)), (2, 2)))): "relu, reduce_window_max "
    "stand between Conv_0 and BatchNorm_0",
}


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__)
def test_a_batch_norm_that_cannot_be_folded(call):
    model, variables, x = linen(call)
    with raises(ValueError, f"model has a batch norm that cannot be folded: {REFUSED[call]}."):
        fold_linen(variables, model=model, example=x)


def test_a_kernel_at_the_top_of_the_variables():
    class Model(nn.Module):
        def setup(self):
            self.conv, self.norm = conv(), norm()
            nn.share_scope(self, self.conv)

        def __call__(self, x):
            return self.norm(self.conv(x))

    x = images()
    variables = variables_of(Model(), x)
    assert find_pairs(Model(), variables, x) == {}
    with raises(
        ValueError,
        "model has a batch norm that cannot be folded: nothing can be folded into the model: its "
        "kernel is not in a module below it.",
    ):
        fold_linen(variables, model=Model(), example=x)


def test_several_batch_norms():
    model, variables, x = linen(two_norms_of_one_layer)
    with raises(
        ValueError,
        "model has 2 batch norms that cannot be folded: the output of Conv_0 also goes to "
        "BatchNorm_1; the output of Conv_0 also goes to BatchNorm_0.",
    ):
        fold_linen(variables, model=model, example=x)


def test_many_batch_norms_of_which_some_can_be_folded():
    def call(x):
        x = norm(name="good")(conv(name="conv")(x))
        for k in range(5):
            x = norm(name=f"norm{k}")(nn.relu(x))
        return x

    model, variables, x = linen(call)
    with raises(
        ValueError,
        "model has 5 batch norms that cannot be folded: relu stands between good and norm0; relu "
        "stands between norm0 and norm1; relu stands between norm1 and norm2; and 2 more. To fold "
        "the others and keep these in the model, pass pairs=find_pairs(model, variables, example, "
        "...).",
    ):
        fold_linen(variables, model=model, example=x)


class TestGivenPairs:
    MODEL, VARIABLES, X = linen(lambda x: norm()(nn.relu(norm()(conv()(norm()(conv()(x)))))))
    fold = staticmethod(partial(fold_linen, VARIABLES, model=MODEL, example=X))

    @pytest.mark.parametrize(
        "pairs, message",
        [
            # Flax names layers in the order in which they are made: the outermost first.
            (
                {"Conv_1": "BatchNorm_1", "Conv_0": "BatchNorm_2"},
                "Conv_1 and BatchNorm_1 cannot be folded: BatchNorm_1 directly follows Conv_0.",
            ),
            (
                {"Conv_0": "BatchNorm_0"},
                "Conv_0 and BatchNorm_0 cannot be folded: relu stands between BatchNorm_1 and "
                "BatchNorm_0.",
            ),
            (
                {"BatchNorm_1": "Conv_0"},
                "pairs names layers without a kernel in params: BatchNorm_1; those with one are "
                "Conv_0, Conv_1.",
            ),
        ],
    )
    def test_message(self, pairs, message):
        with raises(ValueError, message):
            self.fold(pairs)

    @pytest.mark.parametrize(
        "options, message",
        [
            (
                {"epsilon": 1e-5},
                "epsilon=1e-05 differs from the epsilon of BatchNorm_1, 0.001. Leave epsilon out: "
                "it is read from the layers of model.",
            ),
            (
                {"axis": 0},
                "axis=0 differs from the output axis of the kernel of Conv_0, -1. Leave axis out: "
                "it is read from the layers of model.",
            ),
        ],
    )
    def test_options_that_are_not_the_layers(self, options, message):
        with raises(ValueError, message):
            self.fold({"Conv_0": "BatchNorm_1"}, **options)

    def test_a_batch_norm_that_is_not_called(self):
        variables = {
            collection: entries | {"unused": entries["BatchNorm_1"]}
            for collection, entries in self.VARIABLES.items()
        }
        with raises(ValueError, "Conv_0 and unused cannot be folded: model does not call unused."):
            fold_linen(variables, {"Conv_0": "unused"}, model=self.MODEL, example=self.X)


class TestArguments:
    MODEL, VARIABLES, X = linen(lambda x: norm()(conv()(x)))

    @pytest.mark.parametrize(
        "arguments, options, message",
        [
            ((), {}, "pairs must be given, or model and example to find them."),
            (
                (3,),
                {},
                "pairs must be a mapping such as {'Conv_0': 'BatchNorm_0'}, or a sequence of pairs "
                "of paths, got 3.",
            ),
            (
                ({},),
                {"example": X, "train": False},
                "example, train must come with model, which is called with them.",
            ),
            ((), {"model": MODEL}, "example must be an input of model, got None."),
            (
                (),
                {"model": MODEL, "example": jax.ShapeDtypeStruct(X.shape, X.dtype)},
                "example must hold arrays, on which the folded layers are checked, got "
                "jax.ShapeDtypeStruct.",
            ),
            (
                (),
                {"model": MODEL.apply, "example": X},
                "model must be a flax.linen.Module, got method.",
            ),
        ],
    )
    def test_message(self, arguments, options, message):
        with raises(TypeError, message):
            fold_linen(self.VARIABLES, *arguments, **options)

    def test_training_mode(self):
        model, variables, x = linen(lambda x: jaxbn.linen.BatchNorm(False)(conv()(x)))
        with raises(
            ValueError,
            "BatchNorm_0 normalizes with the statistics of the batch, and folding is for "
            "evaluation: pass the model's arguments too, such as train=False.",
        ):
            fold_linen(variables, model=model, example=x)

    def test_an_error_of_fold_names_the_pair(self):
        variables = jax.tree.map(lambda leaf: leaf, self.VARIABLES)
        var = variables["batch_stats"]["BatchNorm_0"]["var"]
        variables["batch_stats"]["BatchNorm_0"]["var"] = var.at[1].set(-1)
        with pytest.raises(ValueError, match=r"^Conv_0 and BatchNorm_0 cannot be folded: state"):
            fold_linen(variables, model=self.MODEL, example=self.X)
