"""Networks and data for the tests of `jaxbn.calibrate`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
import jaxbn.linen

N = 101
CUTS = {"one": [N], "two": [50, 51], "odd last": [32, 32, 32, 5], "tiny": [1, 1, 1, 98]}
# The rounding of statistics of values near one, through four layers.
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}


def cut(x, sizes):
    """Split `x` into batches of these sizes."""
    return np.split(x, np.cumsum(sizes)[:-1])


def data(dtype="float32", shape=(N, 3, 4)):
    rng = np.random.default_rng(0)
    # Rows have different means, so that batches differ.
    x = rng.normal(size=shape) + np.linspace(-2, 3, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return x.astype(dtype)


# Tracks the unbiased variance, which differs from the one that normalizes.
Norm = partial(jaxbn.linen.BatchNorm, **jaxbn.PYTORCH)


class Chain(nn.Module):
    norm: Callable[..., Any] = Norm

    @nn.compact
    def __call__(self, x, train):
        for _ in range(4):
            x = nn.Dense(8, param_dtype=x.dtype)(x)
            x = nn.relu(self.norm(use_running_average=not train)(x))
        return x


class Branches(nn.Module):
    norm: Callable[..., Any] = Norm

    @nn.compact
    def __call__(self, x, train):
        norm = partial(self.norm, use_running_average=not train)
        x = norm()(nn.Dense(8, param_dtype=x.dtype)(x))
        left = nn.tanh(norm(axis=(0, -1) if x.ndim == 2 else -1)(nn.relu(x)))
        right = norm(axis=1)(x) if x.ndim == 3 else norm()(x)
        return norm()(x + left * right)


class Block(nn.Module):
    norm: Callable[..., Any]
    train: bool

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(x.shape[-1], param_dtype=x.dtype)(x)
        return nn.tanh(self.norm(use_running_average=not self.train)(x)), None


class Scanned(nn.Module):
    norm: Callable[..., Any] = Norm

    @nn.compact
    def __call__(self, x, train):
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(Block, axes, split_rngs={"params": True}, length=3)
        return blocks(self.norm, train)(x)[0]


class Rematerialized(nn.Module):
    norm: Callable[..., Any] = Norm

    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x, _ = nn.remat(Block)(self.norm, train)(x)
        return x


def initialized(make, x):
    """Return the network, and variables with wrong statistics."""
    network = make()
    variables = network.init(jax.random.key(0), jnp.asarray(x), train=False)
    variables = {k: jax.tree.map(lambda v: v.astype(x.dtype), c) for k, c in variables.items()}
    return network, {
        **variables,
        "batch_stats": jax.tree.map(lambda v: 100 * (v + 3), variables["batch_stats"]),
    }


def one_step(network, variables, x):
    """Return the statistics after a training step on all of `x` with momentum 0."""
    forgetful = network.clone(norm=partial(network.norm, momentum=0.0))
    apply = jax.jit(partial(forgetful.apply, train=True, mutable=["batch_stats"]))
    return apply(variables, jnp.asarray(x))[1]["batch_stats"]
