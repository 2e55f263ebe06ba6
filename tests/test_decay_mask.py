"""With `decay_mask` in Optax, kernels shrink, and scales and biases are unchanged bit for bit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import jaxbn
import jaxbn.linen

RATE, DECAY, STEPS = 0.1, 0.01, 3


class Network(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4)(tokens)
        x = jaxbn.linen.BatchNorm(False)(nn.Dense(3)(x))
        return nn.LayerNorm(name="bias")(nn.Dense(2, name="scale")(x))


@pytest.fixture
def variables():
    """Return variables whose values all differ from zero, which would not shrink."""
    variables = jax.jit(Network().init)(jax.random.key(0), jnp.arange(8).reshape(4, 2) % 5)
    return jax.tree.map(lambda leaf: leaf + 0.7, variables)


MASK = {
    "params": {
        "Embed_0": {"embedding": True},
        "Dense_0": {"kernel": True, "bias": False},
        "BatchNorm_0": {"scale": False, "bias": False},
        # Modules may have these names too; only those of leaves matter.
        "scale": {"kernel": True, "bias": False},
        "bias": {"scale": False, "bias": False},
    },
    "batch_stats": {"BatchNorm_0": {"mean": False, "var": False}},
}


def test_mask_of_linen(variables):
    assert jaxbn.decay_mask(variables) == MASK
    assert jaxbn.decay_mask(variables["params"]) == MASK["params"]
    frozen = jaxbn.decay_mask(freeze(variables))
    assert frozen == freeze(MASK)
    assert jax.tree.structure(frozen) == jax.tree.structure(freeze(variables))


def test_mask_of_shapes_alone(variables):
    shapes = jax.eval_shape(lambda: variables)
    assert jaxbn.decay_mask(shapes) == MASK


def test_mask_of_params_and_state():
    params, state = jaxbn.init((2, 3), track_count=True)
    assert jaxbn.decay_mask((params, state)) == (
        {"scale": False, "bias": False},
        {"mean": False, "var": False, "count": False},
    )


def test_mask_of_boxed_parameters():
    def boxed(init):
        return nn.with_partitioning(init, (None,))

    layer = nn.Dense(
        3, kernel_init=boxed(nn.initializers.ones), bias_init=boxed(nn.initializers.ones)
    )
    params = layer.init(jax.random.key(0), jnp.ones((2, 3)))["params"]
    assert isinstance(params["bias"], nn.Partitioned)
    mask = jaxbn.decay_mask(params)
    assert (mask["kernel"].value, mask["bias"].value) == (True, False)


@pytest.mark.parametrize(
    "variables, where",
    [(jnp.ones(3), "the root"), ([jnp.ones(3)], "[0]"), ({0: jnp.ones(3)}, "[0]")],
)
def test_leaves_without_a_name(variables, where):
    with pytest.raises(ValueError) as raised:
        jaxbn.decay_mask(variables)
    assert str(raised.value) == (
        f"variables must name its leaves, as {{'kernel': ..., 'bias': ...}} does; the leaf at "
        f"{where} has no name."
    )


OPTIMIZERS = {
    "sgd": optax.chain(
        optax.masked(optax.add_decayed_weights(DECAY), jaxbn.decay_mask), optax.sgd(RATE)
    ),
    "mask of add_decayed_weights": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(DECAY, mask=jaxbn.decay_mask),
        optax.sgd(RATE),
    ),
    "adamw": optax.adamw(RATE, weight_decay=DECAY, mask=jaxbn.decay_mask),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_without_gradients_only_weights_shrink(variables, tx):
    before = variables["params"]
    after = run(tx, before, jax.tree.map(jnp.zeros_like, before))

    def check(old, new, decays):
        if decays:
            # A step rounds a product by a product and a difference: three half units at most.
            tolerance = STEPS * 3 * 2**-24
            np.testing.assert_allclose(new, old * (1 - RATE * DECAY) ** STEPS, rtol=tolerance)
            assert np.all(new != old)
        else:
            np.testing.assert_array_equal(new, old)

    jax.tree.map(check, before, after, MASK["params"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_the_mask_scales_shrink(variables, name):
    """The test above depends on the mask."""
    params = variables["params"]
    tx = {
        "adamw": optax.adamw(RATE, weight_decay=DECAY),
    }.get(name, optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE)))
    after = run(tx, params, jax.tree.map(jnp.zeros_like, params))
    assert np.all(after["BatchNorm_0"]["scale"] < params["BatchNorm_0"]["scale"])


def test_decay_does_not_change_how_scales_and_biases_learn(variables):
    """Compare a single step with real gradients: in later steps, the kernels differ."""
    tokens = jnp.arange(8).reshape(4, 2) % 5

    def loss(params):
        y, _ = Network().apply({**variables, "params": params}, tokens, mutable=["batch_stats"])
        return jnp.sum(y * jnp.sin(jnp.arange(y.size)).reshape(y.shape))

    params = variables["params"]
    grads = jax.jit(jax.grad(loss))(params)
    with_decay = run(OPTIMIZERS["sgd"], params, grads, steps=1)
    without = run(optax.sgd(RATE), params, grads, steps=1)
    for name in ("BatchNorm_0", "bias"):
        for key in ("scale", "bias"):
            np.testing.assert_array_equal(with_decay[name][key], without[name][key])
    assert np.all(with_decay["Dense_0"]["kernel"] != without["Dense_0"]["kernel"])
    assert np.any(without["BatchNorm_0"]["bias"] != params["BatchNorm_0"]["bias"])


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nnx(tx):
    model = NnxNetwork(nnx.Rngs(0))
    linear, norm = model.layers
    linear.bias.set_value(jnp.full(3, 0.7))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, before))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))["layers"]
    before = nnx.to_pure_dict(before)["layers"]
    np.testing.assert_allclose(
        after[0]["kernel"], before[0]["kernel"] * (1 - RATE * DECAY), rtol=3 * 2**-24
    )
    assert np.all(after[0]["kernel"] != before[0]["kernel"])
    np.testing.assert_array_equal(after[0]["bias"], before[0]["bias"])
    for key in ("scale", "bias"):
        np.testing.assert_array_equal(after[1][key], before[1][key])
    assert float(norm.scale[0]) == 1


def test_mask_of_a_whole_nnx_model():
    """The state of a model includes its statistics."""
    model = NnxNetwork(nnx.Rngs(0))
    mask = nnx.to_pure_dict(jaxbn.decay_mask(nnx.state(model)))
    assert mask["layers"] == {
        0: {"kernel": True, "bias": False},
        1: {"scale": False, "bias": False, "mean": False, "var": False},
    }


def run(tx, params, grads, steps=STEPS):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params
