"""Wrap a pure JAX function and its state as a layer, and `jaxbn.batch_norm` with it."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._batch_norm import Params, State, batch_norm
from jaxbn.parity._adapters.shared_jit import shared_jit
from jaxbn.parity._layer import DifferentiableLayer

Apply = Callable[[Any, Any, jax.Array, bool], tuple[jax.Array, Any]]


def batch_norm_layer(params: Params, state: State, **options: Any) -> DifferentiableLayer:
    """Wrap `jaxbn.batch_norm` as a layer for the parity tools.

    Args:
      params: `scale` and `bias`, of shape (C,). Either or both may be missing.
      state: `mean`, `var` and, for `momentum=None`, `count`.
      **options: keyword arguments of `batch_norm`, such as a convention.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Raises:
      ValueError: `axis` is not a single axis.

    Example:
      >>> import jaxbn, jaxbn.parity, numpy as np
      >>> layer = jaxbn.parity.batch_norm_layer(*jaxbn.init((8, 2)), **jaxbn.FLAX)
      >>> y, gradients = layer.step(np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32))
      >>> sorted(gradients)
      ['bias', 'scale', 'x']
    """

    apply = accept_matrix(_Function(tuple(sorted(options.items()))), options.get("axis", -1))
    return JaxFunctionLayer(
        apply, dict(params), dict(state), mean_and_var, with_features=lambda _: apply
    )


class _Function(NamedTuple):
    """`jaxbn.batch_norm` with options. Equal options make equal functions."""

    options: tuple[tuple[str, Any], ...]

    def __call__(self, params: Any, state: Any, x: jax.Array, train: bool) -> Any:
        return batch_norm(params, state, x, train, **dict(self.options))


class JaxFunctionLayer:
    """A layer made of a pure function `apply(params, state, x, train) -> (y, state)`.

    Args:
      apply: the function. Layers share compiled programs if their functions are equal, or if
        tracing them gives the same program.
      params, state: its first two arguments. The layer replaces its state after each training step.
      statistics: takes the running mean and variance out of a state.
      named: takes `scale` and `bias` out of anything with the structure of `params`.
      with_features: returns `apply` for another number of features. None if there is none.
    """

    def __init__(
        self,
        apply: Apply,
        params: Any,
        state: Any,
        statistics: Callable[[Any], tuple[Any, Any]],
        named: Callable[[Any], Mapping[str, Any]] = lambda params: params,
        with_features: Callable[[int], Apply] | None = None,
    ):
        self.params, self.state, self.statistics = params, state, statistics
        self.named, self.with_features = named, with_features
        try:
            self._programs = _shared_programs(apply)
        except TypeError:
            # Options that cannot be hashed, such as arrays, cannot be compared either.
            self._programs, self.with_features = _programs(apply), None

    def train(self, x: np.ndarray) -> np.ndarray:
        y, self.state = self._programs.train(self.params, self.state, jnp.asarray(x))
        return np.asarray(y)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._programs.evaluate(self.params, self.state, jnp.asarray(x)))

    def running(self) -> tuple[np.ndarray, np.ndarray]:
        mean, var = (np.asarray(v).reshape(-1) for v in self.statistics(self.state))
        return mean, var

    def step(self, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        arrays = (jnp.asarray(v) for v in (x, dy))
        y, dparams, dx, self.state = self._programs.step(self.params, self.state, *arrays)
        gradients = {"x": dx, **self.named(dparams)}
        found = {k: np.asarray(v) for k, v in gradients.items() if v is not None}
        return np.asarray(y), {k: v if k == "x" else v.reshape(-1) for k, v in found.items()}

    def repeated(self, number: int) -> "JaxFunctionLayer | None":
        """Return a copy with this many features, which are those of this layer again and again.

        Return None if the layer cannot have another number of features.
        """
        if self.with_features is None:
            return None
        num_features = jax.eval_shape(self.statistics, self.state)[0].size
        leaves = jax.tree.leaves((self.params, self.state))
        if not all(_is_per_feature(v, num_features) for v in leaves):
            return None
        params, state = jax.tree.map(lambda v: _repeat(v, number), (self.params, self.state))
        apply = self.with_features(number)
        return JaxFunctionLayer(apply, params, state, self.statistics, self.named)


class _Programs(NamedTuple):
    """The compiled functions of a layer."""

    train: Callable[..., Any]
    evaluate: Callable[..., Any]
    step: Callable[..., Any]


def _programs(apply: Apply) -> _Programs:
    def step(params, state, x, dy):
        def of_inputs(params, x):
            return apply(params, state, x, True)

        y, vjp, state = jax.vjp(of_inputs, params, x, has_aux=True)
        return y, *vjp(dy.astype(y.dtype)), state

    return _Programs(
        shared_jit(lambda params, state, x: apply(params, state, x, True)),
        shared_jit(lambda params, state, x: apply(params, state, x, False)[0]),
        shared_jit(step),
    )


# Equal functions also share the tracing. The layers of a network have few different options.
_shared_programs = lru_cache(maxsize=32)(_programs)


def _is_per_feature(leaf: Any, num_features: int) -> bool:
    """Return whether an array is a scalar, or has a value per feature along one axis."""
    if leaf.ndim == 0:
        return True
    return leaf.size == max(leaf.shape) == num_features and (leaf.size > 1 or leaf.ndim == 1)


def _repeat(leaf: Any, number: int) -> Any:
    """Return the leaf with its values repeated until there are this many."""
    if leaf.ndim == 0:
        return leaf
    shape = list(leaf.shape)
    shape[shape.index(leaf.size)] = number
    return jnp.asarray(np.resize(leaf, shape))


def mean_and_var(state: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the running statistics of a state with the names that this library and Linen use."""
    return state["mean"], state["var"]


def accept_matrix(apply: Apply, axis: Any, ndim: int | None = None) -> Apply:
    """Make an `apply` whose features lie on `axis` accept and return arrays of shape (N, C).

    Args:
      apply: the function to wrap.
      axis: its feature axis.
      ndim: how many dimensions its input has. By default, as few as `axis` allows.
    """
    if not isinstance(axis, int):
        raise ValueError(f"the layer's axis is {axis}; only a single feature axis can be probed.")
    if ndim is None:
        ndim = max(2, axis + 1 if axis >= 0 else -axis + (axis < -1))
    return _OnMatrix(apply, axis % ndim, ndim)


class _OnMatrix(NamedTuple):
    """`apply` of arrays of shape (N, C), for one of arrays with `ndim` axes, features on `axis`."""

    apply: Apply
    axis: int
    ndim: int

    def __call__(self, params: Any, state: Any, x: jax.Array, train: bool) -> Any:
        ones = (1,) * (self.ndim - 2)
        x = jnp.moveaxis(x.reshape(*x.shape, *ones), 1, self.axis)
        y, state = self.apply(params, state, x, train)
        y = jnp.moveaxis(y, self.axis, 1)
        return y.reshape(y.shape[:2]), state
