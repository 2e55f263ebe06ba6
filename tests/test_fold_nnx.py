"""`fold_nnx`: the copy of a model, with its batch norms folded, computes what the model did."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from jaxbn.inference import fold_nnx
from tests.close import assert_equal
from tests.fold_models import CHANNELS, Chain, chain, images, nnx_conv, nnx_norm
from tests.nnx_models import Nested, Rematerialized, Scanned, Shared, Vmapped, data, derived, made
from tests.raises import raises

up = partial(nnx.ConvTranspose, CHANNELS, CHANNELS, (3, 3), use_bias=False)
flax_norm = partial(nnx.BatchNorm, CHANNELS, epsilon=0.1)
# The layers before each batch norm, and the longest sum of products in them.
MODELS = {
    "convolutions": (
        (nnx_conv, nnx_norm, nnx.relu, partial(nnx_conv, use_bias=False), flax_norm),
        9 * CHANNELS,
    ),
    "transposed": ((up, nnx_norm, partial(up, transpose_kernel=True), flax_norm), 9 * CHANNELS),
    "linear": (
        (
            partial(nnx.Linear, CHANNELS, CHANNELS, use_bias=False),
            partial(jaxbn.nnx.BatchRenorm, CHANNELS),
            partial(nnx.LinearGeneral, CHANNELS, (2, CHANNELS)),
            flax_norm,
            partial(nnx.Einsum, "nhwki,kio->nhwo", (2, CHANNELS, CHANNELS), (CHANNELS,)),
            partial(nnx_norm, use_scale=False),
        ),
        2 * CHANNELS,
    ),
    "mask of the kernel": (
        (partial(nnx_conv, mask=jnp.ones((3, 3, 4, 4)).at[0].set(0)), nnx_norm),
        9 * CHANNELS,
    ),
}


def assert_equal_up_to_rounding(got, expected, layers, products):
    """Compare outputs of two models of this many layers, with sums of this many products."""
    # Two roundings of each product, and ten of each sum, in all layers of both models.
    tolerance = 2 * layers * (products + 10) * np.finfo(expected.dtype).eps / 2
    assert got.dtype == expected.dtype
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_the_copy_computes_the_same(x64, name):
    makers, products = MODELS[name]
    model, x = chain(*makers, dtype=jnp.float64), images(jnp.float64)
    before = nnx.split(model)
    folded = fold_nnx(model, x)
    after = nnx.split(model)
    assert after[0] == before[0]
    assert_equal(after[1], before[1])
    assert_equal_up_to_rounding(folded(x), model(x), len(makers), products)
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    assert not [m for _, m in nnx.iter_graph(folded) if isinstance(m, nnx.BatchNorm)]


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
@pytest.mark.parametrize("make", [Nested, Rematerialized])
def test_nested_models(make, norm):
    """Blocks in lists, in nnx.jit and nnx.remat, and a norm that stays."""
    model = made(make, norm)
    model.eval()
    folded = fold_nnx(model, data())
    # Two blocks of two layers, and the head.
    compare = partial(assert_equal_up_to_rounding, layers=5, products=4)
    compare(folded(data()), model(data()))
    assert list(nnx.to_pure_dict(nnx.state(folded, nnx.BatchStat))) == ["head"]
    compiled = nnx.jit(lambda model, x: model(x))(folded, data())
    compare(compiled, model(data()))


class TestTheCopy:
    def folded(self):
        model = chain(partial(nnx_conv, use_bias=False), partial(nnx_norm, dtype=jnp.bfloat16))
        return model, fold_nnx(model, images())

    def test_dtype_and_bias(self):
        model, folded = self.folded()
        assert folded(images()).dtype == model(images()).dtype == jnp.bfloat16
        shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(folded)))
        assert shapes == {"layers": {0: {"kernel": (3, 3, 4, 4), "bias": (CHANNELS,)}}}
        assert folded.layers[0].use_bias

    def test_training_mode(self):
        _, folded = self.folded()
        text = (
            "use_running_average must be True in a model whose batch norms are folded, which is "
            "for evaluation only: call model.eval(), or train the model that was folded."
        )
        folded.train()
        with raises(ValueError, text):
            folded(images())
        folded.eval()
        expected = folded(images())
        with raises(ValueError, text):
            folded.layers[1](images(), use_running_average=False)
        with raises(ValueError, text):
            nnx.view(folded, use_running_average=False)(images())
        assert_equal(nnx.view(folded, use_running_average=True)(images()), expected)

    def test_mask(self):
        _, folded = self.folded()
        with raises(
            ValueError, "mask must be None for a folded batch norm: it is part of its layer."
        ):
            folded.layers[1](images(), mask=jnp.ones((2, 1, 1, 1), bool))

    def test_it_is_a_model_like_others(self):
        _, folded = self.folded()
        again = nnx.merge(*nnx.split(nnx.clone(folded)))
        assert_equal(again(images()), folded(images()))
        with raises(ValueError, "model must call a batch norm, but calls none on example."):
            fold_nnx(folded, images())

    def test_given_pairs_only(self):
        model = chain(nnx_conv, nnx_norm, nnx_conv, nnx_norm)
        folded = fold_nnx(model, images(), pairs={"layers/2": "layers/3"})
        assert list(nnx.to_pure_dict(nnx.state(folded, nnx.BatchStat))["layers"]) == [1]
        both = fold_nnx(model, images())
        assert_equal(folded.layers[2].kernel.get_value(), both.layers[2].kernel.get_value())

    def test_overridden_options(self):
        model = chain(nnx_conv, flax_norm)
        expected = fold_nnx(chain(nnx_conv, nnx_norm), images())
        jaxbn.nnx.override(model, {"**": {"epsilon": 1e-3}})
        assert_equal(nnx.state(fold_nnx(model, images())), nnx.state(expected))


class Standardized(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.ones((CHANNELS, CHANNELS)))
        self.bias = nnx.Param(jnp.ones(CHANNELS))

    def __call__(self, x):
        kernel = self.kernel[...]
        y = x @ (kernel / jnp.std(kernel, 0, keepdims=True))
        return y + self.bias[...].reshape(1, 1, 1, -1)


def tied():
    model = chain(nnx_conv, nnx_norm, nnx_conv, nnx_norm)
    model.layers[2].kernel = model.layers[0].kernel
    return model


def of_test_models(make, norm=jaxbn.nnx.BatchNorm):
    model = made(make, norm)
    model.eval()
    return model


START = "model has a batch norm that cannot be folded: "
REFUSED = {
    "relu": (
        lambda: chain(nnx_conv, nnx.relu, nnx_norm),
        START + "relu stands between layers/0 and layers/2.",
    ),
    "tied": (
        tied,
        "model has 2 batch norms that cannot be folded: the kernel of layers/0 is also used by "
        "layers/2; nothing can be folded into layers/2: it shares its kernel with another layer.",
    ),
    "shared": (lambda: of_test_models(Shared), START + "first/norm is called 2 times."),
    "scanned": (
        lambda: of_test_models(Scanned),
        START + "blocks/norm is called inside a loop, branch or map (scan).",
    ),
    "mapped": (
        lambda: of_test_models(Vmapped),
        START + "nothing can be folded into blocks/dense: its kernel has the shape (4, 4) in the "
        "call and (3, 4, 4) among the variables, as inside nn.scan or nn.vmap.",
    ),
    "derived": (
        lambda: of_test_models(Nested, derived(jaxbn.nnx.BatchNorm)),
        "model has 3 batch norms that cannot be folded: mul stands between blocks/0/dense and "
        "blocks/0/norm; mul stands between blocks/1/dense and blocks/1/norm; relu, mul stand "
        "between blocks/1/norm and head.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_in_which_nothing_can_be_folded(name):
    make, message = REFUSED[name]
    model = make()
    with raises(ValueError, message):
        fold_nnx(model, data() if "blocks" in vars(model) or name == "shared" else images())


def test_a_norm_with_a_call_of_its_own():
    class Clipped(jaxbn.nnx.BatchNorm):
        def __call__(self, x, use_running_average=None, *, mask=None):
            return jnp.clip(super().__call__(x, use_running_average, mask=mask), -1, 1)

    with raises(ValueError, START + "layers/1 is of the class Clipped, which has its own call."):
        fold_nnx(chain(nnx_conv, partial(Clipped, CHANNELS)), images())


def test_a_layer_that_is_not_linear_in_its_kernel():
    model = Chain(Standardized(nnx.Rngs(0)), nnx_norm(rngs=nnx.Rngs(0)))
    kernel = np.random.default_rng(0).normal(size=(CHANNELS, CHANNELS))
    model.layers[0].kernel.set_value(jnp.asarray(kernel, jnp.float32))
    model.layers[1].scale.set_value(jnp.full(CHANNELS, 3.0))
    model.eval()
    with pytest.raises(ValueError, match=r"layers/0 and layers/1 cannot be folded: on example"):
        fold_nnx(model, images())


@pytest.mark.parametrize(
    "pairs, error, message",
    [
        (
            {"layers/0": "layers/3", "layers/2": "layers/1"},
            ValueError,
            "layers/0 and layers/3 cannot be folded: layers/3 directly follows layers/2.",
        ),
        (
            {"layers/1": "layers/0"},
            ValueError,
            "pairs names layers without a call on example: layers/1; those with one are layers/0, "
            "layers/2.",
        ),
        (
            {"layers/0": "layers/1", "layers/2": "layers/1"},
            ValueError,
            "pairs names batch norms more than once: layers/1.",
        ),
        (
            3,
            TypeError,
            "pairs must be a mapping such as {'Conv_0': 'BatchNorm_0'}, or a sequence of pairs of "
            "paths, got 3.",
        ),
    ],
)
def test_pairs_that_are_refused(pairs, error, message):
    with raises(error, message):
        fold_nnx(chain(nnx_conv, nnx_norm, nnx_conv, nnx_norm), images(), pairs=pairs)


def test_arguments():
    with raises(TypeError, "model must be a flax.nnx.Module, got dict."):
        fold_nnx({}, images())
    model = chain(nnx_conv, nnx_norm)
    with raises(TypeError, "example must be an input of model, got None."):
        fold_nnx(model, None)
    model.train()
    with raises(
        ValueError,
        "layers/1 normalizes with the statistics of the batch, and folding is for evaluation: call "
        "model.eval() first.",
    ):
        fold_nnx(model, images())
