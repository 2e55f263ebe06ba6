"""NNX models with batch norms in every place where models have them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def derived(layer):
    """Return a user's layer, derived from a batch norm."""

    class Derived(layer):
        def __call__(self, x, use_running_average=None):
            return super().__call__(2 * x, use_running_average)

    return Derived


class Block(nnx.Module):
    def __init__(self, norm, rngs):
        self.dense = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.norm = norm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.dense(x)))


class Nested(nnx.Module):
    """A list of blocks, each of them compiled, and a norm outside of it."""

    def __init__(self, norm, rngs):
        self.blocks = nnx.List([Block(norm, rngs) for _ in range(2)])
        self.head = norm(4, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.jit(Block.__call__)(block, x)
        return self.head(x)


class Shared(nnx.Module):
    def __init__(self, norm, rngs):
        self.first = Block(norm, rngs)
        self.second = Block(norm, rngs)
        self.second.norm = self.first.norm

    def __call__(self, x):
        return self.second(self.first(x))


class Scanned(nnx.Module):
    def __init__(self, norm, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return Block(norm, rngs)

        self.blocks = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return run(self.blocks, x)


class Vmapped(Scanned):
    def __call__(self, x):
        return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(self.blocks, x)


class Rematerialized(Nested):
    def __call__(self, x):
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x)
        return self.head(x)


MODELS = [Nested, Shared, Scanned, Vmapped, Rematerialized]


def data():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(3, 2, (32, 4)), jnp.float32)


def made(make, norm):
    """Return a model whose parameters and statistics all differ from the defaults."""
    model = make(norm, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(
        model,
        jax.tree.map(
            lambda v: jnp.asarray(np.asarray(v) + rng.uniform(0.5, 1, v.shape), v.dtype), state
        ),
    )
    return model


@nnx.jit
def train_step(model, x):
    """Return outputs and gradients of a training step, and update the model's statistics."""

    def loss(model, x):
        y = model(x)
        return jnp.sum(jnp.sin(y)), y

    (dmodel, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return nnx.to_pure_dict(dmodel), dx, y


def statistics(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
