"""What the adapters are made of: a pure function with its state, and a layer of PyTorch."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Apply = Callable[[Any, Any, jax.Array, bool], tuple[jax.Array, Any]]


class JaxLayer:
    """A pure function, `apply(params, state, x, train) -> (y, state)`, with its state beside it."""

    def __init__(
        self,
        apply: Apply,
        params: Any,
        state: Any,
        statistics: Callable[[Any], tuple[Any, Any]],
        named: Callable[[Any], Mapping[str, Any]] = lambda params: params,
    ):
        """`statistics` takes mean and variance out of the state, `named` `scale` and `bias` out of
        what has the structure of the parameters."""

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


def with_layout(apply: Apply, axis: Any, ndim: int | None = None) -> Apply:
    """`apply` of a layer with features on `axis`, for (N, C)."""
    if not isinstance(axis, int):
        raise ValueError(f"the layer's axis is {axis}; only a single feature axis can be probed.")
    if ndim is None:
        ndim = max(2, axis + 1 if axis >= 0 else -axis + (axis < -1))
    axis %= ndim

    def laid_out(params, state, x, train):
        ones = (1,) * (ndim - 2)
        y, state = apply(params, state, jnp.moveaxis(x.reshape(*x.shape, *ones), 1, axis), train)
        return jnp.moveaxis(y, axis, 1).reshape(x.shape), state

    return laid_out


class TorchLayer:
    """A copy of a `torch.nn.BatchNorm1d`, `2d` or `3d`."""

    def __init__(self, layer: Any):
        import torch

        self.torch = torch
        # A copy made in inference mode could not be differentiated later.
        with torch.inference_mode(False):
            self.layer = copy.deepcopy(layer)
        rank = {torch.nn.BatchNorm2d: 4, torch.nn.BatchNorm3d: 5}
        self.ones = (1,) * (next((r for t, r in rank.items() if isinstance(layer, t)), 2) - 2)

    def _tensor(self, x: np.ndarray) -> Any:
        # NumPy's arrays of bfloat16 are unknown to PyTorch; float32 holds them exactly.
        known = x.dtype in (np.float16, np.float32, np.float64)
        tensor = self.torch.tensor(x if known else x.astype(np.float32))
        if not known:
            tensor = tensor.to(getattr(self.torch, x.dtype.name))
        # A layer in float32 takes half precision too, but one in another dtype only that.
        kept = self.layer.running_mean
        if kept.dtype != self.torch.float32:
            tensor = tensor.to(kept.dtype)
        return tensor.to(kept.device).reshape(*x.shape, *self.ones)

    def _numpy(self, tensor: Any) -> np.ndarray:
        if tensor.dtype == self.torch.bfloat16:
            tensor = tensor.float()
        return tensor.detach().cpu().numpy()

    def _array(self, tensor: Any) -> np.ndarray:
        return self._numpy(tensor).reshape(tensor.shape[:2])

    def train(self, x: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self._array(self.layer.train()(self._tensor(x)))

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self._array(self.layer.eval()(self._tensor(x)))

    def running(self) -> tuple[np.ndarray, np.ndarray]:
        # Copies: the layer updates its own in place, and NumPy would look on.
        mean, var = self.layer.running_mean, self.layer.running_var
        return self._numpy(mean).copy(), self._numpy(var).copy()

    def step(self, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        # The caller may have turned gradients off.
        with self.torch.inference_mode(False), self.torch.enable_grad():
            leaves = {"x": self._tensor(x), "scale": self.layer.weight, "bias": self.layer.bias}
            leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
            for leaf in leaves.values():
                leaf.requires_grad_()
            y = self.layer.train()(leaves["x"])
            cotangent = self._tensor(dy).to(y.dtype)
            found = self.torch.autograd.grad(y, list(leaves.values()), cotangent)
        return self._array(y), {n: self._array(g) for n, g in zip(leaves, found, strict=True)}
