"""Record what a layer returns for a sequence of batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxbn.parity._cotangent import COTANGENT_SEED
from jaxbn.parity._layer import DifferentiableLayer, Layer


class Batch(NamedTuple):
    """A batch, the cotangent of its output, and its statistics per feature, in float64.

    Attributes:
      x, dy: the batch and the cotangent, of shape (N, C).
      mean: the mean.
      var: the biased variance.
      mean_over_std: the distance of the mean from zero in standard deviations; infinite for a
        constant feature.
    """

    x: np.ndarray
    dy: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    mean_over_std: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, dy: np.ndarray) -> Batch:
        exact = x.astype(np.float64)
        mean, var = exact.mean(0), exact.var(0)
        mean_over_std = np.full(mean.shape, np.inf)
        np.divide(np.abs(mean), np.sqrt(var), out=mean_over_std, where=var > 0)
        return cls(x, dy, mean, var, mean_over_std)

    @property
    def centered(self) -> np.ndarray:
        return self.x.astype(np.float64) - self.mean

    def variance(self, estimator: str) -> np.ndarray:
        n = len(self.x)
        return self.var if estimator == "biased" else self.var * n / max(n - 1, 1)


class Step(NamedTuple):
    """What one layer returned for one batch.

    Attributes:
      y: the output of the training step.
      gradients: its gradients with respect to "x", "scale" and "bias".
      mean, var: the running statistics after it.
      evaluation: the output in evaluation after it.
    """

    y: np.ndarray
    gradients: Mapping[str, np.ndarray]
    mean: np.ndarray
    var: np.ndarray
    evaluation: np.ndarray

    def quantities(self) -> dict[str, np.ndarray]:
        """Return everything under the names that the report uses."""
        gradients = {f"d{name}": gradient for name, gradient in self.gradients.items()}
        return {
            "y": self.y,
            **gradients,
            "running mean": self.mean,
            "running var": self.var,
            "evaluation y": self.evaluation,
        }


class Recording(NamedTuple):
    """What one layer returned for all batches.

    Attributes:
      mean, var: the running statistics before the first step.
      steps: one entry per batch.
    """

    mean: np.ndarray
    var: np.ndarray
    steps: Sequence[Step]

    def running(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the running mean and variance before the first step and after each step."""
        return [(self.mean, self.var), *((step.mean, step.var) for step in self.steps)]


def checked_batches(batches: Iterable[np.ndarray]) -> list[Batch]:
    """Return the batches, each with a cotangent that is the same in every run."""
    rng = np.random.default_rng(COTANGENT_SEED)
    result = []
    for i, x in enumerate(batches):
        x = np.asarray(x)
        if not np.issubdtype(x.dtype, np.floating):
            raise TypeError(
                f"batches[{i}] must be float32 or float64, got {x.dtype}; convert it, for instance "
                "with x.astype(np.float32)."
            )
        if x.ndim != 2 or x.size == 0:
            raise ValueError(
                f"batches[{i}] must have shape (N, C), with at least one value; got {x.shape}."
            )
        if result and x.shape[1] != result[0].x.shape[1]:
            raise ValueError(
                f"batches[{i}] has {x.shape[1]} features, but batches[0] has "
                f"{result[0].x.shape[1]}; all batches must have the same number."
            )
        if not np.all(np.isfinite(x)):
            raise ValueError(f"batches[{i}] has values that are not finite.")
        result.append(Batch.of(x, rng.normal(size=x.shape).astype(x.dtype)))
    if not result:
        raise ValueError("batches is empty; at least one batch is needed.")
    return result


def record(layer: Layer, batches: Sequence[Batch], gradients: bool) -> Recording:
    """Train the layer on the batches, and evaluate it on each batch after its training step."""

    def running() -> tuple[np.ndarray, np.ndarray]:
        # Copied, because the layer may return the very arrays that it goes on to update.
        mean, var = layer.running()
        return np.array(mean), np.array(var)

    start = running()
    steps = []
    for batch in batches:
        grads: Mapping[str, np.ndarray] = {}
        if gradients:
            assert isinstance(layer, DifferentiableLayer)
            y, grads = layer.step(batch.x.copy(), batch.dy.copy())
        else:
            y = layer.train(batch.x.copy())
        y, grads = np.array(y), {name: np.array(grad) for name, grad in grads.items()}
        mean, var = running()
        evaluation = np.array(layer.evaluate(batch.x.copy()))
        steps.append(Step(y, grads, mean, var, evaluation))
    return Recording(*start, steps)
