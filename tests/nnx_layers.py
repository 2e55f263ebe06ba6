"""Helpers to make, fill and train `jaxbn.nnx` layers in tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn.nnx

STEPS = 3
X = jax.random.normal(jax.random.key(0), (8, 3))


def ours(num_features, **options):
    return jaxbn.nnx.BatchNorm(num_features, **options, rngs=nnx.Rngs(0))


def arrays(state):
    return {name: leaf[...] for name, leaf in state.items()}


def params(layer):
    return arrays(nnx.state(layer, nnx.Param))


def stats(layer):
    return arrays(nnx.state(layer, nnx.BatchStat))


def randomize(layer, seed=1):
    """Set parameters and statistics to values that no default matches by chance."""
    rng = np.random.default_rng(seed)
    state = nnx.state(layer)
    for leaf in state.values():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf[...] = jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype)
    nnx.update(layer, state)
    return layer


def train_step(layer, x, dy, **call):
    """Return output and gradients of parameters and input, and update the layer's statistics."""
    graphdef, trained, rest = nnx.split(layer, nnx.Param, ...)

    def forward(trained, x):
        merged = nnx.merge(graphdef, trained, rest, copy=True)
        y = merged(x, **call)
        return y, nnx.state(merged, nnx.BatchStat)

    y, vjp, new = jax.vjp(forward, trained, x, has_aux=True)
    nnx.update(layer, new)
    dparams, dx = vjp(dy.astype(y.dtype))
    return y, arrays(dparams), dx


def batches(shape, dtype):
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield (
            jnp.asarray(v, dtype) for v in (1 + 2 * rng.normal(size=shape), rng.normal(size=shape))
        )
