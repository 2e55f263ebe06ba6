"""Models whose batch norms are found and folded by tracing."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn.linen
import jaxbn.nnx

CHANNELS = 4
conv = partial(nn.Conv, CHANNELS, (3, 3))
norm = partial(jaxbn.linen.BatchNorm, use_running_average=True, epsilon=1e-3)


class Model(nn.Module):
    """A Linen model whose call is a function, which may make layers."""

    call: Callable[..., Any]

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


class Block(nn.Module):
    """A convolution, a batch norm and a ReLU, as the body of a scan has to be."""

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(norm()(conv(use_bias=False)(x))), None


class StandardizedConv(nn.Module):
    """A convolution that undoes any change of its kernel's scale."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(), (CHANNELS, CHANNELS))
        bias = self.param("bias", nn.initializers.normal(), (CHANNELS,))
        return x @ (kernel / jnp.std(kernel, 0, keepdims=True)) + bias.reshape(1, 1, 1, -1)


class WithoutBias(nn.Module):
    """A layer that ignores a bias among its variables."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.normal(), (CHANNELS, CHANNELS))


class OneScope(nn.Module):
    """A module whose batch norm has its variables among those of the module."""

    def setup(self):
        self.conv, self.norm = conv(), norm()
        nn.share_scope(self, self.norm)

    def __call__(self, x):
        return self.norm(self.conv(x))


class Chain(nnx.Module):
    """NNX layers one after another."""

    def __init__(self, *layers):
        self.layers = nnx.List(list(layers))

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def chain(*makers: Any, dtype: Any = jnp.float32) -> Chain:
    """Return an NNX model in evaluation mode, from functions that get `rngs`, and functions."""
    rngs = nnx.Rngs(0)
    layers = (make(rngs=rngs) if isinstance(make, partial) else make for make in makers)
    model = Chain(*layers)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, lively(state, dtype))
    model.eval()
    return model


nnx_conv = partial(nnx.Conv, CHANNELS, CHANNELS, (3, 3))
nnx_norm = partial(jaxbn.nnx.BatchNorm, CHANNELS, epsilon=1e-3)


def lively(tree: Any, dtype: Any = jnp.float32) -> Any:
    """Return a tree of the same shapes with positive values, so that no variance is negative."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.2, 2, leaf.shape), dtype), tree)


def images(dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5, CHANNELS)), dtype)


def variables_of(model: nn.Module, x: Any, dtype: Any = jnp.float32, **kwargs: Any) -> Any:
    shapes = jax.eval_shape(partial(model.init, **kwargs), jax.random.key(0), x)
    return lively(shapes, dtype)


def linen(call: Callable[..., Any]) -> tuple[nn.Module, Any, jax.Array]:
    """Return a model, variables and an example input."""
    model, x = Model(call), images()
    return model, variables_of(model, x), x
