"""Wrap a batch norm of PyTorch."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxbn.convert._entries import array
from jaxbn.parity._layer import DifferentiableLayer

if TYPE_CHECKING:
    import torch


def torch_layer(layer: Any) -> DifferentiableLayer:
    """Wrap `torch.nn.BatchNorm1d`, `2d` or `3d` as a layer for the parity tools.

    Args:
      layer: the layer. It is copied, not changed.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Raises:
      TypeError: the layer is of another kind, such as a `torch.nn.LayerNorm`.
      ValueError: the layer keeps no running statistics.

    Example:
      >>> import torch, jaxbn.parity
      >>> layer = jaxbn.parity.torch_layer(torch.nn.BatchNorm2d(4))
      >>> for name, value in jaxbn.parity.identify(layer, 4).items():
      ...     print(name, value)
      momentum 0.9
      epsilon 1e-05
      batch_variance biased
      running_variance unbiased
    """
    if not (hasattr(layer, "running_mean") and hasattr(layer, "running_var")):
        raise TypeError(
            f"the layer must be a torch.nn.BatchNorm1d, 2d or 3d, or have the attributes "
            f"running_mean and running_var, got "
            f"{type(layer).__module__}.{type(layer).__qualname__}."
        )
    if layer.running_mean is None:
        raise ValueError("the layer keeps no running statistics; there is nothing to identify.")
    return _TorchLayer(layer)


def tensor_of(x: np.ndarray) -> torch.Tensor:
    """Return a copy of an array as a tensor."""
    import torch

    # PyTorch does not know NumPy's bfloat16; float32 holds its values exactly.
    return (
        torch.tensor(x.astype(np.float32)).bfloat16()
        if x.dtype == jnp.bfloat16
        else torch.tensor(x)
    )


class _TorchLayer:
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
        tensor = tensor_of(x)
        # A layer in float32 accepts half precision, too; any other accepts only its own dtype.
        own = self.layer.running_mean
        if own.dtype != self.torch.float32:
            tensor = tensor.to(own.dtype)
        return tensor.to(own.device).reshape(*x.shape, *self.ones)

    def _numpy(self, tensor: Any) -> np.ndarray:
        values = np.asarray(array(tensor))
        return values.astype(np.float32) if values.dtype == jnp.bfloat16 else values

    def _array(self, tensor: Any) -> np.ndarray:
        return self._numpy(tensor).reshape(tensor.shape[:2])

    def train(self, x: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self._array(self.layer.train()(self._tensor(x)))

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        with self.torch.no_grad():
            return self._array(self.layer.eval()(self._tensor(x)))

    def running(self) -> tuple[np.ndarray, np.ndarray]:
        # Copies, because the layer updates its own in place and NumPy shares their memory.
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
