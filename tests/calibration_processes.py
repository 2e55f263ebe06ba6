"""Models, and data in parts, for the tests of `recalibrate` over several processes."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from tests.calibration import Chain, Norm, cut, data


class Case(NamedTuple):
    """A model with its variables, the batches of each process, and further arguments."""

    make: Callable[[], tuple[Any, Any]]
    parts: tuple[list[Any], list[Any]]
    options: dict[str, Any]
    dtype: str = "float32"


class Varied(nn.Module):
    """Calls `deep` in deep batches alone, and `shared` once more. Batches may differ in mode."""

    @nn.compact
    def __call__(self, x, deep, train):
        norm = partial(Norm, use_running_average=not train)
        shared = norm(name="shared")
        x = nn.tanh(shared(x))
        return shared(norm(name="deep")(x) ** 2) if deep else x


class Listed(nnx.Module):
    """Has integers in the paths of its layers."""

    def __init__(self):
        norm = partial(jaxbn.nnx.BatchNorm, 4, rngs=nnx.Rngs(0))
        self.norms = nnx.List([norm(), norm()])

    def __call__(self, x):
        return self.norms[1](nnx.tanh(self.norms[0](x)))


def chain(key=0, dtype="float32"):
    network = Chain()
    variables = network.init(jax.random.key(key), data(), train=False)
    return network, jax.tree.map(lambda leaf: leaf.astype(dtype), variables)


def varied():
    model = Varied()
    return model, model.init(jax.random.key(0), data(), deep=True, train=False)


def listed():
    model = Listed()
    return model, nnx.state(model)


def one_layer():
    layer = Norm(use_running_average=False)
    return layer, layer.init(jax.random.key(0), data(shape=(5, 16)))


def two_layers(**options):
    """Return a layer with these options before one that is calibrated."""
    model = nn.Sequential([Norm(**options), Norm(use_running_average=False)])
    return model, model.init(jax.random.key(0), data(shape=(5, 16)))


def modes(*deep_and_train):
    """Return a batch for each pair."""
    batches = np.array_split(data(), len(deep_and_train))
    return [
        {"x": x, "deep": deep, "train": train}
        for x, (deep, train) in zip(batches, deep_and_train, strict=True)
    ]


FAR = np.split(1e4 + data(shape=(101, 16)), [40])
CASES = {
    # Sixteen features that float32 holds to 1e-3, so that a mean rounded in between would show.
    "one batch each": Case(one_layer, ([FAR[0]], [FAR[1]]), {}),
    "unequal numbers": Case(chain, (cut(data()[:70], [32, 32, 6]), [data()[70:]]), {"train": True}),
    "no batch": Case(chain, ([], cut(data(), [50, 51])), {"train": False}),
    "calls of one process": Case(
        varied, (modes((False, True)), modes((False, True), (True, True))), {}
    ),
    "training in one process": Case(
        varied, (modes((True, False)), modes((True, False), (True, True))), {}
    ),
    # Shows in its last bits the order in which the parts are merged.
    "float64": Case(
        partial(chain, dtype="float64"),
        ([data("float64")[:31]], cut(data("float64")[31:], [10, 60])),
        {"train": True},
        "float64",
    ),
    "one pass": Case(
        chain,
        (cut(data()[:70], [32, 32, 6]), [data()[70:]]),
        {"train": True, "passes": 1, "running_variance": "biased"},
    ),
    "nnx": Case(listed, (cut(data(), [50, 51]), [data()[:9]]), {}),
}


def recalibrated(case, batches, **options):
    """Return the leaves of the recalibrated variables."""
    with jax.enable_x64(case.dtype == "float64"):
        model, variables = case.make()
        return jax.tree.leaves(recalibrate(model, variables, batches, **options, **case.options))


def wanted(case):
    """Return what one process computes from all batches."""
    return recalibrated(case, [batch for part in case.parts for batch in part])
