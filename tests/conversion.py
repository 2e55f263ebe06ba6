"""Batch norms of all frameworks behind one interface, and comparisons with jaxbn's."""

import os
from typing import Any

# Keras reads this when it is imported. Its JAX backend needs no other framework.
os.environ["KERAS_BACKEND"] = "jax"

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import torch

import jaxbn
from jaxbn import convert
from tests import oracle

# The mark of tests in which Keras converts its own arrays to NumPy, by a deprecated call.
ignore_keras_warning = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

FEATURES = 5
EPSILON = 1e-3
MOMENTUM = 0.9

# Both sum about a hundred numbers of order one and divide; eps is 2e-16.
FLOAT64_TOLERANCE = 1e-10
# Outside TensorFlow, Keras always computes in float32. A value is rounded about twelve times by
# eps / 2, in terms that are up to three times the largest value.
FLOAT32_TOLERANCE = 12 * 3 * float(jnp.finfo(jnp.float32).eps) / 2

CONSTANT_MOMENTUM = {"axis": 1, "epsilon": EPSILON, "momentum": MOMENTUM}
BIASED = {"batch_variance": "biased", "running_variance": "biased"}

batch_norm = jax.jit(
    jaxbn.batch_norm,
    static_argnums=3,
    static_argnames=("axis", "epsilon", "batch_variance", "running_variance"),
)


def with_bias_correction(options, state):
    """Return options with the momentum that updates an average as a bias-corrected one."""
    if "count" not in state:
        return options
    count = int(state["count"])
    return options | {"momentum": 1 - (1 - MOMENTUM) / (1 - MOMENTUM ** (count + 1))}


class Torch:
    """A PyTorch layer behind the interface of all classes here, with features on axis 1."""

    module = torch.nn.BatchNorm2d
    shape = (4, FEATURES, 3, 6)
    params = (("scale", "bias"), ())
    tolerance = FLOAT64_TOLERANCE

    def __init__(self, params, dtype="float64"):
        self.layer = self.module(
            FEATURES, EPSILON, 1 - MOMENTUM, affine=bool(params), dtype=getattr(torch, dtype)
        )

    def run(self, x, train):
        self.layer.train(train)
        return self.layer(torch.tensor(x)).detach().numpy()

    def ours(self):
        return convert.from_torch(self.layer.state_dict())

    def load(self, params, state):
        self.layer.load_state_dict(convert.to_torch(params, state))

    def options(self, state):
        return CONSTANT_MOMENTUM


class Torch1d(Torch):
    module = torch.nn.BatchNorm1d
    shape = (12, FEATURES)


class Torch3d(Torch):
    module = torch.nn.BatchNorm3d
    shape = (3, FEATURES, 2, 3, 4)


class Keras:
    shape = (4, FEATURES, 3, 6)
    params = (("scale", "bias"), ("scale",), ("bias",), ())
    tolerance = FLOAT32_TOLERANCE

    def __init__(self, params, dtype="float64"):
        self.layer = keras.layers.BatchNormalization(
            1, MOMENTUM, EPSILON, center="bias" in params, scale="scale" in params, dtype=dtype
        )
        self.layer.build(self.shape)

    def run(self, x, train):
        return np.asarray(self.layer(x, training=train))

    def ours(self):
        return convert.from_keras({v.name: v.numpy() for v in self.layer.weights})

    def load(self, params, state):
        self.layer.set_weights(list(convert.to_keras(params, state).values()))

    def options(self, state):
        return CONSTANT_MOMENTUM | BIASED


class Haiku:
    shape = (4, FEATURES, 3, 6)
    params = Keras.params
    tolerance = FLOAT64_TOLERANCE

    def __init__(self, params, dtype="float64"):
        def layer(x, train):
            norm = hk.BatchNorm(
                "scale" in params, "bias" in params, MOMENTUM, EPSILON, data_format="NC..."
            )
            return norm(x, train)

        transformed = hk.transform_with_state(layer)
        self.apply = jax.jit(transformed.apply, static_argnums=4)
        self.variables = transformed.init(None, jnp.ones(self.shape, dtype), True)

    def run(self, x, train):
        params, state = self.variables
        y, state = self.apply(params, state, None, x, train)
        self.variables = params, state
        return y

    def ours(self):
        return convert.from_haiku(*self.variables)

    def load(self, params, state):
        shape = (1, FEATURES, 1, 1)
        self.variables = convert.to_haiku(params, state, momentum=MOMENTUM, shape=shape)

    def options(self, state):
        return with_bias_correction(CONSTANT_MOMENTUM | BIASED, state)


@eqx.filter_jit
def equinox_step(layer, x, state, train):
    def of_example(x, state):
        return layer(x, state, inference=not train)

    mapped = jax.vmap(of_example, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return mapped(x, state)


class Equinox:
    mode = "batch"
    shape = (4, FEATURES, 3, 6)
    params = Torch.params
    tolerance = FLOAT64_TOLERANCE

    def __init__(self, params, dtype="float64"):
        make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        self.layer, self.state = make(
            *(FEATURES, "batch", EPSILON, bool(params), MOMENTUM), dtype=dtype, mode=self.mode
        )

    def run(self, x, train):
        y, self.state = equinox_step(self.layer, jnp.asarray(x), self.state, train)
        return y

    def ours(self):
        return convert.from_equinox(self.layer, self.state)

    def load(self, params, state):
        self.layer, self.state = convert.to_equinox(params, state, self.layer, self.state)

    def options(self, state):
        return with_bias_correction(CONSTANT_MOMENTUM | BIASED, state)


class EquinoxEma(Equinox):
    """Training normalizes with the averages, so only these can be compared."""

    mode = "ema"

    def options(self, state):
        return CONSTANT_MOMENTUM | BIASED


FRAMEWORKS = [Torch, Torch1d, Torch3d, Keras, Haiku, Equinox, EquinoxEma]
CASES = [
    pytest.param(framework, params, id=f"{framework.__name__}-{'+'.join(params) or 'plain'}")
    for framework in FRAMEWORKS
    for params in framework.params
]


def random_numbers(params, dtype: Any = np.float64, seed=1, count: int | None = 3):
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.normal(size=FEATURES), dtype) for name in params}
    state = {
        "mean": jnp.asarray(rng.normal(size=FEATURES), dtype),
        "var": jnp.asarray(rng.uniform(0.5, 2, size=FEATURES), dtype),
    }
    if count is not None:
        state["count"] = jnp.int32(count)
    return params, state


def batches(shape, seed, number=3):
    rng = np.random.default_rng(seed)
    return [1 + step + 2 * rng.normal(size=shape) for step in range(number)]


def assert_close(a, b, tolerance=FLOAT64_TOLERANCE):
    assert oracle.error(a, b) <= tolerance


def assert_evaluates_alike(theirs, params, state):
    for x in batches(theirs.shape, seed=2):
        y, _ = batch_norm(params, state, x, False, axis=1, epsilon=EPSILON)
        assert_close(y, theirs.run(x, False), theirs.tolerance)


def assert_trains_alike(theirs, params, state):
    """Take the same steps on both sides, and return jaxbn's state after them."""
    for x in batches(theirs.shape, seed=3):
        y, state = batch_norm(params, state, x, True, **theirs.options(state))
        their_y = theirs.run(x, True)
        if not isinstance(theirs, EquinoxEma):
            assert_close(y, their_y, theirs.tolerance)
        assert_evaluates_alike(theirs, params, state)
    return state


def assert_same(ours, others):
    """Compare keys, dtypes and bits."""
    assert jax.tree.structure(ours) == jax.tree.structure(others)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
