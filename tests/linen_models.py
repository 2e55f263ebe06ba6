"""Linen models with batch norms in every place where models have them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def derived(layer):
    """Return a user's layer, derived from a batch norm."""

    class Derived(layer):
        def __call__(self, x, use_running_average=None):
            return super().__call__(2 * x, use_running_average)

    return Derived


class Block(nn.Module):
    norm: Any
    train: bool

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(4, use_bias=False)(x)
        return nn.relu(self.norm(use_running_average=not self.train)(x)), None


class Nested(nn.Module):
    """`compact`, with nested modules and a norm that gets its mode in the call."""

    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = Backbone(self.norm, name="backbone")(x, train)
        return self.norm(name="head")(nn.Dense(4)(x), use_running_average=not train)


class Backbone(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x, _ = Block(self.norm, train)(x)
        return x


class Setup(nn.Module):
    norm: Any

    def setup(self):
        self.dense = nn.Dense(4)
        self.norms = [self.norm(), self.norm()]

    def __call__(self, x, train):
        x = self.norms[0](self.dense(x), use_running_average=not train)
        return self.norms[1](nn.relu(x), use_running_average=not train)


class Shared(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        norm = self.norm(use_running_average=not train, name="shared")
        return norm(nn.relu(norm(nn.Dense(4)(x))))


class Scanned(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(Block, axes, split_rngs={"params": True}, length=3)
        return blocks(self.norm, train)(x)[0]


class Vmapped(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.vmap(Block, axes, split_rngs={"params": True})
        return blocks(self.norm, train)(jnp.stack([x, 2 * x]))[0]


class Rematerialized(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x, _ = nn.remat(Block)(self.norm, train)(x)
        return x


class Compiled(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x, _ = nn.jit(Block)(self.norm, train)(x)
        return x


MODELS = [Nested, Setup, Shared, Scanned, Vmapped, Rematerialized, Compiled]


def data():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(3, 2, (32, 4)), jnp.float32)


def initialized(model):
    """Return variables whose statistics and parameters all differ from the defaults."""
    rng = np.random.default_rng(1)
    variables = model.init(jax.random.key(0), data(), False)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf) + rng.uniform(0.5, 1, leaf.shape), leaf.dtype),
        variables,
    )


def train_step(apply, variables, x):
    """Return outputs, new statistics and gradients of a training step, compiled."""

    def loss(params, x):
        variables_with = {**variables, "params": params}
        y, updates = apply(variables_with, x, True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, updates)

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], x)
