"""What a layer gave for a sequence of batches, and the batches' statistics in float64."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxbn.parity._layer import DifferentiableLayer, Layer

# No seed that a user would take: a cotangent that is the batch again has no gradient to speak of.
COTANGENT_SEED = (106, 97, 120, 98, 110)


class Batch(NamedTuple):
    """A batch (N, C), the cotangent of its output, and its statistics per feature.

    `var` is the biased variance, `far` the number of deviations that the mean is from zero.
    """

    x: np.ndarray
    dy: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    far: np.ndarray

    @property
    def centered(self) -> np.ndarray:
        return self.x.astype(np.float64) - self.mean

    def variance(self, estimator: str) -> np.ndarray:
        n = len(self.x)
        return self.var if estimator == "biased" else self.var * n / max(n - 1, 1)


class Step(NamedTuple):
    """What one layer gave for one batch: in training, and then in evaluation."""

    y: np.ndarray
    gradients: Mapping[str, np.ndarray]
    mean: np.ndarray
    var: np.ndarray
    evaluation: np.ndarray


class Trace(NamedTuple):
    """What one layer gave for all batches; `mean` and `var` are those it started with."""

    mean: np.ndarray
    var: np.ndarray
    steps: Sequence[Step]

    def statistics(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The running mean and variance before the first step and after each."""
        return [(self.mean, self.var), *((step.mean, step.var) for step in self.steps)]


def batch(x: np.ndarray, dy: np.ndarray) -> Batch:
    exact = x.astype(np.float64)
    mean, var = exact.mean(0), exact.var(0)
    # A feature that is constant has no deviation to count in: it is infinitely far.
    far = np.full(mean.shape, np.inf)
    np.divide(np.abs(mean), np.sqrt(var), out=far, where=var > 0)
    return Batch(x, dy, mean, var, far)


def checked(batches: Iterable[np.ndarray]) -> list[Batch]:
    """The batches, each with a cotangent that is the same in every run."""
    rng = np.random.default_rng(COTANGENT_SEED)
    result = []
    for i, x in enumerate(batches):
        x = np.asarray(x)
        if not np.issubdtype(x.dtype, np.floating):
            raise TypeError(
                f"batches[{i}] must be of float32 or float64, got {x.dtype}; convert it, for "
                f"instance with x.astype(np.float32)."
            )
        if x.ndim != 2 or x.size == 0:
            raise ValueError(
                f"batches[{i}] must have shape (N, C), with at least one value; got {x.shape}."
            )
        if result and x.shape[1] != result[0].x.shape[1]:
            raise ValueError(
                f"batches[{i}] has {x.shape[1]} features, batches[0] {result[0].x.shape[1]}; all "
                f"batches must have as many."
            )
        if not np.all(np.isfinite(x)):
            raise ValueError(f"batches[{i}] holds values that are not finite.")
        result.append(batch(x, rng.normal(size=x.shape).astype(x.dtype)))
    if not result:
        raise ValueError("batches is empty: at least one batch is needed.")
    return result


def record(layer: Layer, batches: Sequence[Batch], gradients: bool) -> Trace:
    """Trains the layer on the batches, evaluating each after its step."""

    def running() -> tuple[np.ndarray, np.ndarray]:
        # Copied: the layer may hand out the very arrays that it goes on to move.
        mean, var = layer.running()
        return np.array(mean), np.array(var)

    start = running()
    steps = []
    for one in batches:
        grads: Mapping[str, np.ndarray] = {}
        if gradients:
            assert isinstance(layer, DifferentiableLayer)
            y, grads = layer.step(one.x.copy(), one.dy.copy())
        else:
            y = layer.train(one.x.copy())
        y, grads = np.array(y), {name: np.array(grad) for name, grad in grads.items()}
        mean, var = running()
        evaluation = np.array(layer.evaluate(one.x.copy()))
        steps.append(Step(y, grads, mean, var, evaluation))
    return Trace(*start, steps)
