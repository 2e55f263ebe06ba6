"""Wrap a pure JAX function and its state as a layer, and `jaxbn.batch_norm` with it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._batch_norm import Params, State, batch_norm
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

    def apply(params, state, x, train):
        return batch_norm(params, state, x, train, **options)

    return JaxFunctionLayer(
        accept_matrix(apply, options.get("axis", -1)), dict(params), dict(state), mean_and_var
    )


class JaxFunctionLayer:
    """A layer made of a pure function `apply(params, state, x, train) -> (y, state)`.

    Args:
      apply: the function.
      params, state: its first two arguments. The layer replaces its state after each training step.
      statistics: takes the running mean and variance out of a state.
      named: takes `scale` and `bias` out of anything with the structure of `params`.
    """

    def __init__(
        self,
        apply: Apply,
        params: Any,
        state: Any,
        statistics: Callable[[Any], tuple[Any, Any]],
        named: Callable[[Any], Mapping[str, Any]] = lambda params: params,
    ):
        def differentiate(params, state, x, dy):
            def of_inputs(params, x):
                return apply(params, state, x, True)

            y, vjp, state = jax.vjp(of_inputs, params, x, has_aux=True)
            dparams, dx = vjp(dy.astype(y.dtype))
            return y, {"x": dx, **named(dparams)}, state

        self.params, self.state, self.statistics = params, state, statistics
        self._train = jax.jit(lambda params, state, x: apply(params, state, x, True))
        self._evaluate = jax.jit(lambda params, state, x: apply(params, state, x, False)[0])
        self._differentiate = jax.jit(differentiate)

    def train(self, x: np.ndarray) -> np.ndarray:
        y, self.state = self._train(self.params, self.state, jnp.asarray(x))
        return np.asarray(y)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self._evaluate(self.params, self.state, jnp.asarray(x)))

    def running(self) -> tuple[np.ndarray, np.ndarray]:
        mean, var = (np.asarray(v).reshape(-1) for v in self.statistics(self.state))
        return mean, var

    def step(self, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        arrays = (jnp.asarray(v) for v in (x, dy))
        y, gradients, self.state = self._differentiate(self.params, self.state, *arrays)
        found = {k: np.asarray(v) for k, v in gradients.items() if v is not None}
        return np.asarray(y), {k: v if k == "x" else v.reshape(-1) for k, v in found.items()}


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
    axis %= ndim

    def apply_to_matrix(params, state, x, train):
        ones = (1,) * (ndim - 2)
        y, state = apply(params, state, jnp.moveaxis(x.reshape(*x.shape, *ones), 1, axis), train)
        return jnp.moveaxis(y, axis, 1).reshape(x.shape), state

    return apply_to_matrix
