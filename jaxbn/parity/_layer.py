"""Define what the parity tools call on a batch norm: three methods, and a fourth for gradients."""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Layer(Protocol):
    """A batch norm as a black box that keeps its own parameters and statistics.

    `x` and `y` are NumPy arrays of shape (N, C). The running statistics have shape (C,).
    """

    def train(self, x: np.ndarray) -> np.ndarray:
        """Make one training step, which updates the running statistics, and return the output."""
        ...

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """Return the output in evaluation, without updating anything."""
        ...

    def running(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the running mean and the running variance, as evaluation uses them."""
        ...


@runtime_checkable
class DifferentiableLayer(Layer, Protocol):
    """A layer that also returns gradients, as all adapters of this package do."""

    def step(self, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Make one training step, as `train` does, and return the gradients of `sum(y * dy)`, too.

        The gradients have the keys "x", of shape (N, C), and "scale" and "bias", of shape (C,). A
        layer without one of these parameters leaves its gradient out.
        """
        ...
