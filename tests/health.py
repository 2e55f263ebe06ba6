"""The same network in Linen and NNX, to plant faults in its running statistics."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from jaxbn.health import check

FEATURES = 8
LAYERS = ("entry", "block/norm", "exit")


def data(n=640, batches=10):
    """Make batches whose means differ, as they do without shuffling."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4)) * [0.5, 1, 2, 3] + np.linspace(-2, 3, n)[:, None]
    return np.split(x.astype("float32"), batches)


def shuffled(n=640, batches=10):
    x = np.concatenate(data(n, batches))
    return np.split(np.random.default_rng(1).permutation(x), batches)


class LinenBlock(nn.Module):
    norm: Callable[..., Any]
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(FEATURES)(nn.relu(x))
        return x + self.norm(use_running_average=not self.train, name="norm")(x)


class LinenNet(nn.Module):
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(self.norm, use_running_average=not train)
        x = norm(name="entry")(nn.Dense(FEATURES, name="first")(x))
        x = LinenBlock(self.norm, train, name="block")(x)
        return nn.Dense(3)(nn.relu(norm(name="exit")(nn.Dense(FEATURES)(x))))


class Linen:
    """The network in Linen, with its variables."""

    def __init__(self, norm=jaxbn.linen.BatchNorm, **options):
        self.model = LinenNet(partial(norm, **options))
        self.variables: Any = self.model.init(jax.random.key(0), np.zeros((1, 4), "float32"))

    def train(self, batches):
        """Update the statistics, not the parameters."""
        step = jax.jit(partial(self.model.apply, train=True, mutable=["batch_stats"]))
        for x in batches:
            self.variables = {**self.variables, **step(self.variables, x)[1]}
        return self

    def recalibrate(self, batches):
        self.variables = recalibrate(self.model, self.variables, batches)
        return self

    def change(self, path: str, **of: Callable[[np.ndarray], Any]):
        """Replace the statistics `of` a layer by functions of them."""
        statistics = nn.FrozenDict(self.variables["batch_stats"]).unfreeze()
        layer = statistics
        for name in path.split("/"):
            layer = layer[name]
        layer.update({k: jnp.asarray(f(np.array(layer[k]))) for k, f in of.items()})
        self.variables = {**self.variables, "batch_stats": statistics}
        return self

    def zero_feature(self, feature):
        """Make a feature of the input of the first norm zero."""
        params = nn.FrozenDict(self.variables["params"]).unfreeze()
        params["first"] = {k: v.at[..., feature].set(0) for k, v in params["first"].items()}
        self.variables = {**self.variables, "params": params}
        return self

    def check(self, batches, **kwargs):
        return check(self.model, self.variables, batches, **kwargs)


class NNXBlock(nnx.Module):
    def __init__(self, norm, rngs):
        self.dense, self.norm = nnx.Linear(FEATURES, FEATURES, rngs=rngs), norm(rngs=rngs)

    def __call__(self, x):
        x = self.dense(nnx.relu(x))
        return x + self.norm(x)


class NNXNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.first = nnx.Linear(4, FEATURES, rngs=rngs)
        self.entry = norm(rngs=rngs)
        self.block = NNXBlock(norm, rngs)
        self.second = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.exit = norm(rngs=rngs)
        self.head = nnx.Linear(FEATURES, 3, rngs=rngs)

    def __call__(self, x):
        x = self.block(self.entry(self.first(x)))
        return self.head(nnx.relu(self.exit(self.second(x))))


class NNX:
    """The network in NNX."""

    def __init__(self, norm=jaxbn.nnx.BatchNorm, **options):
        self.model = NNXNet(partial(norm, FEATURES, **options), nnx.Rngs(0))

    def train(self, batches):
        step = nnx.jit(lambda model, x: model(x))
        for x in batches:
            step(self.model, x)
        return self

    def recalibrate(self, batches):
        nnx.update(self.model, recalibrate(self.model, nnx.state(self.model), batches))
        return self

    def change(self, path: str, **of: Callable[[np.ndarray], Any]):
        layer: Any = self.model
        for name in path.split("/"):
            layer = getattr(layer, name)
        for name, function in of.items():
            variable = getattr(layer, name)
            variable.set_value(jnp.asarray(function(np.array(variable.get_value()))))
        return self

    def zero_feature(self, feature):
        for variable in (self.model.first.kernel, self.model.first.bias):
            variable.set_value(variable.get_value().at[..., feature].set(0))
        return self

    def check(self, batches, **kwargs):
        return check(self.model, None, batches, **kwargs)


NETWORKS: Mapping[str, Callable[..., Any]] = {
    "linen": Linen,
    "flax.linen": partial(Linen, nn.BatchNorm),
    "nnx": NNX,
    "flax.nnx": partial(NNX, nnx.BatchNorm),
}


def codes(report):
    """Return the path and the code of each finding."""
    return [(finding.path, finding.code) for finding in report.findings]


class Model(nn.Module):
    """A model that is a function of a batch norm and its inputs."""

    function: Callable[..., Any]
    train: bool = False

    @nn.compact
    def __call__(self, *args, **kwargs):
        return self.function(partial(jaxbn.linen.BatchNorm, not self.train), *args, **kwargs)


def exact(function, batches, train=False) -> Any:
    """Return the model, and variables with the exact statistics of batches, which are arrays."""
    variables = Model(function).init(jax.random.key(0), batches[0])
    variables = recalibrate(Model(function), variables, batches)
    return Model(function, train), variables
