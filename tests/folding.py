"""Layers, batch norms and comparisons for the tests of `jaxbn.inference`."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn

IN, OUT, EPSILON = 4, 8, 1e-3
HIGHEST = jax.lax.Precision.HIGHEST
conv = partial(nn.Conv, OUT, (3, 3), precision=HIGHEST)
transposed = partial(nn.ConvTranspose, OUT, (3, 3), precision=HIGHEST)

# The layer, the shape of its input, and the output axis of its kernel.
LAYERS = {
    "dense": (partial(nn.Dense, OUT, precision=HIGHEST), (5, IN), -1),
    "dense on sequences": (partial(nn.Dense, OUT, precision=HIGHEST), (2, 3, IN), -1),
    "1d": (partial(nn.Conv, OUT, (3,), precision=HIGHEST), (2, 7, IN), -1),
    "2d, zero padding": (partial(conv, padding="SAME"), (2, 6, 5, IN), -1),
    "2d, no padding": (partial(conv, padding="VALID"), (2, 6, 5, IN), -1),
    "2d, strides": (partial(conv, strides=(2, 1)), (2, 6, 5, IN), -1),
    "2d, dilation": (partial(conv, kernel_dilation=2), (2, 6, 5, IN), -1),
    "3d": (partial(nn.Conv, OUT, (2, 2, 2), precision=HIGHEST), (2, 3, 4, 3, IN), -1),
    "grouped": (partial(conv, feature_group_count=2), (2, 6, 5, IN), -1),
    "depthwise": (partial(conv, feature_group_count=IN), (2, 6, 5, IN), -1),
    "transposed": (partial(transposed, strides=(2, 2)), (2, 4, 3, IN), -1),
    "transposed, transposed kernel": (
        partial(transposed, strides=(2, 2), transpose_kernel=True),
        (2, 4, 3, IN),
        -2,
    ),
}


def lively_norm(dtype, features=OUT, keepdims=()):
    """Return parameters and statistics of very different sizes, so that no error is hidden."""
    rng = np.random.default_rng(5)
    scale = rng.normal(size=features)
    scale[0], scale[1] = 0, -3
    var = 10 ** rng.uniform(-6, 6, size=features)
    var[2] = 0
    mean = 100 * rng.normal(size=features)
    leaves = (scale, rng.normal(size=features), mean, var)
    scale, bias, mean, var = (jnp.asarray(v.reshape(-1, *keepdims), dtype) for v in leaves)
    return {"scale": scale, "bias": bias}, {"mean": mean, "var": var}


def unit_roundoff(dtype):
    return float(jnp.finfo(dtype).eps) / 2


def layer_then_norm(layer, kernel, bias, params, state, x):
    y = apply(layer, kernel, bias, x)
    return jaxbn.batch_norm(params, state, y, False, epsilon=EPSILON)[0]


def apply(layer, kernel, bias, x):
    params = {"kernel": kernel} | ({} if bias is None else {"bias": bias})
    module = layer(use_bias=bias is not None, dtype=x.dtype, param_dtype=x.dtype)
    return module.apply({"params": params}, x)


def of_layer(layer, shape, use_bias, dtype):
    """Return an input, a kernel and a bias."""
    rng = np.random.default_rng(6)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    params = shapes(layer(use_bias=use_bias), x)["params"]
    values = {k: jnp.asarray(rng.normal(size=v.shape), dtype) for k, v in params.items()}
    return x, values["kernel"], values.get("bias")


def shapes(model, x):
    """Return the shapes of the model's variables."""
    return jax.eval_shape(model.init, jax.random.key(0), x)
