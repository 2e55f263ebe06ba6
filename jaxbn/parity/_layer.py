"""What the parity tools ask of a batch norm: three calls, and a fourth for gradients."""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Layer(Protocol):
    """A batch norm as a black box that keeps its own parameters and statistics.

    `x` and `y` are NumPy arrays of shape (N, C), the running statistics of shape (C,).
    """

    def train(self, x: np.ndarray) -> np.ndarray:
        """One training step: the output, with the running statistics moved."""
        ...

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """The output in evaluation; nothing moves."""
        ...

    def running(self) -> tuple[np.ndarray, np.ndarray]:
        """The running mean and the running variance, as evaluation uses them."""
        ...


@runtime_checkable
class DifferentiableLayer(Layer, Protocol):
    """A layer that also gives gradients, as all of this package's adapters do."""

    def step(self, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """One training step, as `train`, and the gradients of `sum(y * dy)`.

        The gradients are under "x" (N, C), "scale" and "bias" (C,), the latter two where the layer
        has them.
        """
        ...
