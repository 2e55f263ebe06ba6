"""The layers that are measured, behind one interface.

All keep `scale`, `bias` and running statistics in float32, return `y` in the input's type, use
Flax's convention, and return new running statistics from training. What a library's interface
forces on its users is part of what is measured: Equinox takes features first only, Haiku and
Equinox round their moments to the input's type, and PyTorch tracks the unbiased variance.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxbn
from benchmarks import torch_contender
from jaxbn.parity._oracle import Result

MOMENTUM, EPSILON = jaxbn.FLAX["momentum"], jaxbn.FLAX["epsilon"]


class Problem(NamedTuple):
    """The shape, feature axis and dtype that a contender compiles for."""

    shape: tuple[int, ...]
    axis: int
    dtype: str


class Arrays(NamedTuple):
    x: jax.Array
    dy: jax.Array
    scale: jax.Array
    bias: jax.Array
    # Running statistics, before the step.
    mean: jax.Array
    var: jax.Array


class Contender(Protocol):
    """A layer for one problem. `put` returns arrays in the form that the calls take."""

    def put(self, arrays: Arrays) -> Any: ...
    def forward(self, batch: Any) -> Any: ...
    def forward_backward(self, batch: Any) -> Any: ...
    def evaluate(self, batch: Any) -> Any: ...
    def numbers(self, batch: Any) -> Result:
        """Return the training step's results; `mean` and `var` are the new running ones."""
        ...


class Layer(NamedTuple):
    """A JAX library's layer: `apply(scale, bias, state, x, train) -> (y, state)`.

    `state(mean, var)` makes its state, and `statistics(state)` returns them.
    """

    apply: Callable[..., tuple[jax.Array, Any]]
    state: Callable[[jax.Array, jax.Array], Any]
    statistics: Callable[[Any], tuple[jax.Array, jax.Array]]


def mean_and_var(mean: jax.Array, var: jax.Array) -> dict[str, jax.Array]:
    return {"mean": mean, "var": var}


def ours(problem: Problem) -> Layer:
    def apply(scale, bias, state, x, train):
        params = {"scale": scale, "bias": bias}
        return jaxbn.batch_norm(params, state, x, train, axis=problem.axis, **jaxbn.FLAX)

    return Layer(apply, mean_and_var, lambda state: (state["mean"], state["var"]))


def flax(problem: Problem, use_fast_variance: bool = True) -> Layer:
    layer = nn.BatchNorm(
        axis=problem.axis,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        dtype=problem.dtype,
        use_fast_variance=use_fast_variance,
    )

    def apply(scale, bias, state, x, train):
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
        y, updates = layer.apply(
            variables, x, use_running_average=not train, mutable=["batch_stats"]
        )
        return y, updates["batch_stats"]

    return Layer(apply, mean_and_var, lambda state: (state["mean"], state["var"]))


def haiku(problem: Problem) -> Layer:
    import haiku as hk

    features = tuple(
        n if a == problem.axis % len(problem.shape) else 1 for a, n in enumerate(problem.shape)
    )
    data_format = "channels_first" if problem.axis == 1 else "channels_last"

    @hk.transform_with_state
    def layer(x, train, scale, bias):
        norm = hk.BatchNorm(False, False, MOMENTUM, EPSILON, data_format=data_format)
        return norm(x, train, scale=scale, offset=bias)

    def apply(scale, bias, state, x, train):
        scale, bias = (v.reshape(features) for v in (scale, bias))
        y, state = layer.apply({}, state, None, x, train, scale, bias)
        return y.astype(x.dtype), state

    def average(value):
        value = value.reshape(features)
        return {"counter": jnp.zeros((), jnp.int32), "hidden": value, "average": value}

    names = ("batch_norm/~/mean_ema", "batch_norm/~/var_ema")

    def state(mean, var):
        return {names[0]: average(mean), names[1]: average(var)}

    def statistics(state):
        # Before Haiku removes the weight of the initial value, which the others keep.
        mean, var = (state[name]["hidden"].reshape(-1) for name in names)
        return mean, var

    return Layer(apply, state, statistics)


def equinox(problem: Problem) -> Layer:
    import equinox as eqx

    features = problem.shape[problem.axis]
    layer, initial = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        features, "batch", EPSILON, momentum=MOMENTUM, mode="batch"
    )

    def apply(scale, bias, state, x, train):
        weighted = eqx.tree_at(lambda one: (one.weight, one.bias), layer, (scale, bias))

        def of_example(x, state):
            return weighted(x, state, inference=not train)

        mapped = jax.vmap(of_example, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        # Equinox takes features first. If they are last, every pixel is made an example, which
        # saves a transposition.
        y, state = mapped(x if problem.axis == 1 else x.reshape(-1, features), state)
        return y.reshape(x.shape).astype(x.dtype), state

    index = layer.batch_state_index
    assert index is not None  # It is None in another mode only.

    def state(mean, var):
        # A copy, because `set` invalidates the state that it is called on.
        return jax.tree.map(lambda leaf: leaf, initial).set(index, (mean, var))

    return Layer(apply, state, lambda state: state.get(index))


class Batch(NamedTuple):
    """The arrays, with the running statistics as the layer's state."""

    x: jax.Array
    dy: jax.Array
    scale: jax.Array
    bias: jax.Array
    state: Any


class JaxContender:
    """A layer under `jit`, with one program for each pass."""

    def __init__(self, layer: Callable[[Problem], Layer], problem: Problem):
        apply, self.state, self.statistics = layer(problem)
        self.dtype = problem.dtype

        def train(scale, bias, state, x):
            return apply(scale, bias, state, x, True)

        def train_and_differentiate(scale, bias, state, x, dy):
            def of_inputs(x, scale, bias):
                return train(scale, bias, state, x)

            y, vjp, state = jax.vjp(of_inputs, x, scale, bias, has_aux=True)
            return y, vjp(dy), state

        self.train = train
        self._forward = jax.jit(train)
        self._forward_backward = jax.jit(train_and_differentiate)
        self._evaluate = jax.jit(lambda *args: apply(*args, False)[0])

    def put(self, arrays: Arrays) -> Batch:
        x, dy = (jnp.asarray(v, self.dtype) for v in (arrays.x, arrays.dy))
        return Batch(x, dy, arrays.scale, arrays.bias, self.state(arrays.mean, arrays.var))

    def forward(self, batch: Batch) -> Any:
        return self._forward(batch.scale, batch.bias, batch.state, batch.x)

    def forward_backward(self, batch: Batch) -> Any:
        return self._forward_backward(batch.scale, batch.bias, batch.state, batch.x, batch.dy)

    def evaluate(self, batch: Batch) -> Any:
        return self._evaluate(batch.scale, batch.bias, batch.state, batch.x)

    def numbers(self, batch: Batch) -> Result:
        y, gradients, state = self.forward_backward(batch)
        return Result(*map(np.asarray, (y, *gradients, *self.statistics(state))))


JAX_LAYERS: Mapping[str, tuple[str, Callable[[Problem], Layer]]] = {
    "ours": ("jaxbn", ours),
    "Flax": ("flax", flax),
    "Flax stable": ("flax", functools.partial(flax, use_fast_variance=False)),
    "Haiku": ("haiku", haiku),
    "Equinox": ("equinox", equinox),
}


def available() -> tuple[dict[str, Callable[[Problem], Contender]], dict[str, str]]:
    """Return the contenders that can run here, ours first, and why the others cannot."""
    found: dict[str, Callable[[Problem], Contender]] = {}
    missing = {}
    for name, (module, layer) in JAX_LAYERS.items():
        try:
            importlib.import_module(module)
            found[name] = functools.partial(JaxContender, layer)
        except ImportError as error:
            missing[name] = str(error)
    try:
        device = torch_contender.device(jax.default_backend())
        found["PyTorch"] = functools.partial(torch_contender.TorchContender, device)
    except (ImportError, RuntimeError) as error:
        missing["PyTorch"] = str(error)
    return found, missing
