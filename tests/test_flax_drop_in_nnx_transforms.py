"""NNX's transforms, bridges and optimizers treat our layer as they treat Flax's."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge

import jaxbn.linen
import jaxbn.nnx
from tests.drop_in import X_OF_4 as X
from tests.drop_in import Block, arrays, assert_close

ours, theirs = jaxbn.nnx.BatchNorm, nnx.BatchNorm


def loss(model, x):
    return jnp.mean(model(x) ** 3)


def jit_and_grad(norm):
    model = Block(norm, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, 0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        value, gradients = nnx.value_and_grad(loss)(model, x)
        optimizer.update(model, gradients)
        return value

    values = [step(model, optimizer, X + k) for k in range(3)]
    model.eval()
    return values, arrays(model), model(X)


def split_and_merge(norm):
    graphdef, params, rest = nnx.split(Block(norm, nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def step(params, rest, x):
        def of(params):
            model = nnx.merge(graphdef, params, rest, copy=True)
            return loss(model, x), nnx.state(model, nnx.BatchStat)

        (value, stats), gradients = jax.value_and_grad(of, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        return params, nnx.merge_state(rest, stats), value

    params, rest, _ = step(params, rest, X)
    params, rest, value = step(params, rest, X + 1)
    return arrays(nnx.merge(graphdef, params, rest)), value


def trees(norm):
    """Treat modules as pytrees, without a graph of their references."""

    @nnx.jit(graph=False)
    def step(model, x):
        gradients = nnx.grad(loss, graph=False, allow_int=True)(model, x)
        params = jax.tree.map(
            lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), nnx.state(gradients, nnx.Param)
        )
        nnx.update(model, params)

    model = Block(norm, nnx.Rngs(0))
    for k in range(2):
        step(model, X + k)
    return arrays(model)


def shared_linear(norm):
    one, two = Block(norm, nnx.Rngs(0)), Block(norm, nnx.Rngs(1))
    two.linear = one.linear
    model = nnx.List([one, two])
    value, gradients = nnx.value_and_grad(lambda m, x: loss(lambda x: m[1](m[0](x)), x))(model, X)
    return value, arrays(gradients), arrays(model)


def ensemble(norm):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return Block(norm, rngs)

    models = create(nnx.Rngs(0))
    return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(models, X), arrays(models)


def shared_parameters(norm):
    """Track separate statistics for each of three batches."""
    axes = nnx.StateAxes({nnx.BatchStat: 0, ...: None})

    @nnx.vmap(in_axes=None, out_axes=axes, axis_size=3)
    def create(key):
        return Block(norm, nnx.Rngs(key))

    model = create(jax.random.key(0))
    y = nnx.vmap(lambda m, x: m(x), in_axes=(axes, 0))(model, np.stack([X, 2 * X, X + 1]))
    return y, arrays(model)


def layers_in_scan(norm):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs):
        return Block(norm, rngs)

    models = create(nnx.Rngs(0))
    forward = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    return forward(X, models), forward(X[:1], models), arrays(models)


def batches_in_scan(norm):
    model = Block(norm, nnx.Rngs(0))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def steps(model, x):
        return model, model(x)

    model, ys = steps(model, np.stack([X, 2 * X, X + 1]))
    return ys, arrays(model)


def remat_and_cond(norm):
    model = Block(norm, nnx.Rngs(0))
    value, gradients = nnx.value_and_grad(nnx.remat(loss))(model, X)
    y = nnx.cond(True, lambda m, x: m(x), lambda m, x: x, model, jnp.asarray(X))
    return value, arrays(gradients), y, arrays(model)


def devices(norm):
    model = Block(norm, nnx.Rngs(0), axis_name="data")
    call = nnx.pmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="data")
    return jax.device_get(call(model, X.reshape(4, 2, 4))), jax.device_get(arrays(model))


def references(norm):
    """Use variables that a trace may write to, in `jax.jit`."""
    with nnx.var_defaults(ref=True):
        model = Block(norm, nnx.Rngs(0))
    y = jax.jit(lambda x: model(x))(X)
    return y, jax.tree.map(jnp.asarray, arrays(model))


def spectral_norm(norm):
    model = nnx.SpectralNorm(
        nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.relu, norm(4, rngs=nnx.Rngs(0))),
        rngs=nnx.Rngs(0),
    )
    return model(X), arrays(model)


def to_linen(norm):
    model = bridge.to_linen(norm, 4)
    variables = model.init(jax.random.key(0), X)
    y, updates = model.apply(variables, X, mutable=["batch_stats"])
    assert set(variables) == {"params", "batch_stats"}
    return y, jax.tree.leaves(updates["batch_stats"])


def from_linen(norm):
    linen = jaxbn.linen.BatchNorm if norm is ours else nn.BatchNorm
    model = bridge.lazy_init(bridge.ToNNX(linen(use_running_average=False), rngs=nnx.Rngs(0)), X)
    return model(X, mutable=["batch_stats"]), arrays(model)


TRANSFORMS = (
    *(jit_and_grad, split_and_merge, trees, shared_linear, ensemble, shared_parameters),
    *(layers_in_scan, batches_in_scan, remat_and_cond, devices, references, spectral_norm),
    *(to_linen, from_linen),
)


@pytest.mark.parametrize("run", TRANSFORMS, ids=lambda run: run.__name__)
def test_transforms(run):
    # Up to three steps or layers, each of which multiplies the roundings before it by a few.
    assert_close(run(ours), run(theirs), 1e-4)


def test_a_comparison_can_fail():
    with pytest.raises(AssertionError):
        assert_close(jit_and_grad(partial(ours, momentum=0.9)), jit_and_grad(theirs), 1e-4)
