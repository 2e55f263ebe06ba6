"""`find_pairs`: the layers that batch norms directly follow, found by tracing the model."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import jaxbn.linen
from jaxbn.inference import find_pairs
from tests.fold_models import Block, chain, conv, images, linen, nnx_conv, nnx_norm, norm
from tests.raises import raises

FIRST = {"Conv_0": "BatchNorm_0"}


def residual(x):
    y = nn.relu(norm(name="first_norm")(conv(name="first")(x)))
    y = norm(name="second_norm")(conv(name="second")(y))
    return nn.relu(y + norm(name="skip_norm")(conv(name="skip")(x)))


def norm_first(x):
    return conv()(nn.relu(norm()(x)))


def scanned(x):
    axes = {"params": 0, "batch_stats": 0}
    return nn.scan(Block, axes, split_rngs={"params": True}, length=3)()(x)[0]


def mapped(x):
    axes = {"params": 0, "batch_stats": 0}
    blocks = nn.vmap(Block, axes, split_rngs={"params": True}, axis_size=2, in_axes=None)
    return blocks()(norm()(conv()(x)))[0]


def equal_compiled_blocks(x):
    block = nn.jit(Block)
    return conv()(block()(block()(x)[0])[0])


def pairs_in(*modules):
    return {f"{module}/Conv_0": f"{module}/BatchNorm_0" for module in modules}


CASES = {
    "residual": (
        residual,
        {"first": "first_norm", "second": "second_norm", "skip": "skip_norm"},
    ),
    "Flax's batch norm": (lambda x: nn.BatchNorm(True)(conv()(x)), FIRST),
    "renorm": (
        lambda x: jaxbn.linen.BatchRenorm(True)(conv()(x)),
        {"Conv_0": "BatchRenorm_0"},
    ),
    "frozen": (lambda x: jaxbn.linen.BatchNorm(False, frozen=True)(conv()(x)), FIRST),
    "identities": (lambda x: norm()(checkpoint_name(conv()(x), "saved")), FIRST),
    "identities in evaluation": (
        lambda x: norm()(jax.lax.optimization_barrier(jax.lax.stop_gradient(conv()(x)))),
        FIRST,
    ),
    "another layer": (lambda x: norm()(nn.GroupNorm(2)(conv()(x))), {}),
    "norm first": (norm_first, {}),
    "no norm": (lambda x: conv()(x), {}),
    "nested": (lambda x: Block()(Block(name="last")(x)[0])[0], pairs_in("last", "Block_0")),
    "remat": (
        lambda x: nn.remat(Block)()(nn.remat(Block)(name="last")(x)[0])[0],
        pairs_in("last", "CheckpointBlock_0"),
    ),
    "jit": (
        lambda x: nn.jit(Block)()(nn.jit(Block)(name="last")(x)[0])[0],
        pairs_in("last", "JitBlock_0"),
    ),
    "equal blocks in one jit": (equal_compiled_blocks, {}),
    "scan": (scanned, {}),
    "vmap, and a layer outside": (mapped, FIRST),
}


@pytest.mark.parametrize("name", CASES)
def test_pairs_of_linen_models(name):
    call, wanted = CASES[name]
    assert list(find_pairs(*linen(call)).items()) == list(wanted.items())


def test_layers_of_setup_are_in_the_order_of_their_calls():
    class Setup(nn.Module):
        def setup(self):
            self.convs = [conv(), conv()]
            self.norms = [jaxbn.linen.BatchNorm(), jaxbn.linen.BatchNorm()]

        def __call__(self, x, train):
            for k in (1, 0):
                x = self.norms[k](self.convs[k](x), use_running_average=not train)
            return x

    model, x = Setup(), images()
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), x)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    wanted = {"convs_1": "norms_1", "convs_0": "norms_0"}
    for example in ((shape,), {"x": shape}):
        got = find_pairs(model, shapes, example, train=False)
        assert list(got.items()) == list(wanted.items())
    assert find_pairs(model, shapes, (shape, False)) == wanted


def test_a_model_that_asks_whether_it_may_write_statistics():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            is_training = self.is_mutable_collection("batch_stats")
            return nn.BatchNorm(not is_training)(conv()(x))

    model, x = Model(), images()
    assert find_pairs(model, model.init(jax.random.key(0), x), x) == FIRST


def test_a_compiled_model_that_has_run_before_is_traced_anew():
    class Compiled(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            return norm()(conv()(x))

    model, x = Compiled(), images()
    variables = model.init(jax.random.key(0), x)
    model.apply(variables, x)
    assert find_pairs(model, variables, x) == FIRST


class TestNNX:
    LAYERS = (nnx_conv, nnx_norm, nnx.relu, nnx_conv, nnx.relu, nnx_norm)

    def test_pairs(self):
        model, x = chain(*self.LAYERS), images()
        wanted = {"layers/0": "layers/1"}
        assert find_pairs(model, None, x) == find_pairs(model, nnx.state(model), x) == wanted
        shapes = jax.eval_shape(lambda: nnx.state(chain(*self.LAYERS)))
        assert find_pairs(model, shapes, jax.ShapeDtypeStruct(x.shape, x.dtype)) == wanted

    def test_the_model_is_unchanged(self):
        model = chain(*self.LAYERS)
        before = nnx.graphdef(model)
        find_pairs(model, None, images())
        assert nnx.graphdef(model) == before

    def test_equal_blocks_in_one_jit(self):
        class Blocks(nnx.Module):
            def __init__(self):
                self.blocks = nnx.List([chain(*self.layers) for _ in range(2)])

            layers = (nnx_conv, nnx_norm)

            def __call__(self, x):
                for block in self.blocks:
                    x = nnx.jit(lambda block, x: block(x))(block, x)
                return x

        wanted = {f"blocks/{k}/layers/0": f"blocks/{k}/layers/1" for k in range(2)}
        assert find_pairs(Blocks(), None, images()) == wanted


class TestErrors:
    def test_training_mode(self):
        model, variables, x = linen(lambda x: jaxbn.linen.BatchNorm(False)(conv()(x)))
        with raises(
            ValueError,
            "BatchNorm_0 normalizes with the statistics of the batch, and folding is for "
            "evaluation: pass the model's arguments too, such as train=False.",
        ):
            find_pairs(model, variables, x)

    def test_training_mode_of_nnx(self):
        model = chain(nnx_conv, nnx_norm)
        model.train()
        with raises(
            ValueError,
            "layers/1 normalizes with the statistics of the batch, and folding is for evaluation: "
            "call model.eval() first.",
        ):
            find_pairs(model, None, images())

    def test_types(self):
        x = jnp.ones((1, 2))
        with raises(
            TypeError, "model must be a flax.linen.Module or a flax.nnx.Module, got function."
        ):
            find_pairs(images, {}, x)
        with raises(TypeError, "variables of a flax.linen.Module must be a mapping, got NoneType."):
            find_pairs(nn.Dense(2), None, x)
        with raises(
            TypeError,
            "variables of an NNX model must be None or an nnx.State, such as nnx.state(model), got "
            "dict.",
        ):
            find_pairs(chain(nnx_conv), {}, x)
