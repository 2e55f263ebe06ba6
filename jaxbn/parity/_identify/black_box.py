"""Call a layer as a black box: check what it returns, and make the batches that probe it."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from jaxbn.parity._layer import Layer

BATCH_SIZES = (2, 3, 16)  # n / (n - 1) is 2, 1.5 and 1.07: the estimators are far apart
# Float32 outputs hardly ever fit into half precision. This many different ones never do.
_MIN_DISTINCT_OUTPUTS = 5


class ConventionError(ValueError):
    """The layer follows none of `batch_norm`'s conventions.

    Attributes:
      probe: which part of the layer does not fit, such as "running mean" or "evaluation".
      reason: what was measured there, and what would fit.
      found: what is known about the convention. If the layer is understood but cannot be expressed,
        it holds all four keywords and the properties for which `batch_norm` has no keyword.
    """

    def __init__(self, probe: str, reason: str, found: Mapping[str, Any]):
        known = ", ".join(f"{name}={value!r}" for name, value in found.items())
        super().__init__(
            f"the layer follows no convention of batch_norm: {probe}: {reason}. "
            f"Otherwise found: {known or 'nothing'}."
        )
        self.probe, self.reason, self.found = probe, reason, dict(found)


class BlackBox:
    """Call a layer, and return its checked results in float64.

    Attributes:
      probe: the part of the convention that is being probed; errors name it.
      steps: how many training steps the layer has made here.
      found: what is known about the convention so far.
    """

    def __init__(self, layer: Layer, num_features: int):
        self.layer, self.num_features = layer, num_features
        self.probe, self.steps = "", 0
        self.found: dict[str, Any] = {}
        # The half-precision dtypes that hold all outputs so far exactly.
        self._half_dtypes = {jnp.bfloat16, jnp.float16}
        self._outputs: set[float] = set()

    def fail(self, reason: str) -> NoReturn:
        if self._half_dtypes and len(self._outputs) >= _MIN_DISTINCT_OUTPUTS:
            names = " or ".join(sorted(np.dtype(dtype).name for dtype in self._half_dtypes))
            reason = (
                f"it computes in {names}, which is too coarse to identify a convention; probe a "
                "copy of it in float32"
            )
            self.found = {}
        raise ConventionError(self.probe, reason, self.found)

    def train(self, x: np.ndarray) -> np.ndarray:
        self.steps += 1
        return self._output("train", self.layer.train, x)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        return self._output("evaluate", self.layer.evaluate, x)

    def running(self) -> tuple[np.ndarray, np.ndarray]:
        mean, var = (np.array(v, np.float64) for v in self.layer.running())
        for name, value in (("mean", mean), ("variance", var)):
            if value.shape != (self.num_features,):
                self.fail(f"the running {name} has shape {value.shape}, not {(self.num_features,)}")
            if not np.isfinite(value).all():
                self.fail(f"the running {name} is not finite")
        if (var < 0).any():
            self.fail("the running variance is negative")
        return mean, var

    def _output(self, name: str, call: Callable, x: np.ndarray) -> np.ndarray:
        y = np.array(call(x.copy()), np.float64)
        if y.shape != x.shape:
            self.fail(f"{name}(x) has shape {y.shape}, but x has shape {x.shape}")
        if not np.isfinite(y).all():
            self.fail(f"{name}(x) is not finite for values between {x.min():.3g} and {x.max():.3g}")
        with np.errstate(over="ignore"):
            self._half_dtypes = {
                dtype
                for dtype in self._half_dtypes
                if np.array_equal(y.astype(dtype).astype(float), y)
            }
        self._outputs |= set(y.flat) if self._half_dtypes else set()
        return y


def probe_batch(size: int, center: Any, deviation: Any, num_features: int) -> np.ndarray:
    """Return a float32 batch of shape (size, num_features) with this mean and standard deviation.

    Around zero, the mean of the batch is exactly zero.
    """
    pattern = np.array([-1, 0, 1]) * 1.5**0.5 if size == 3 else np.resize([-1.0, 1.0], size)
    center, deviation = (np.broadcast_to(v, num_features) for v in (center, deviation))
    return (center + pattern[:, None] * deviation).astype(np.float32)


def over_biased(estimator: str, size: int) -> float:
    """Return the ratio of this estimator of the variance to the biased one."""
    return size / (size - 1) if estimator == "unbiased" else 1.0


def shortest_decimal(value: float, tolerance: float) -> float:
    """Return the decimal with the fewest digits that is within `tolerance` of `value`."""
    for digits in range(1, 17):
        if abs(float(f"{value:.{digits}g}") - value) <= tolerance:
            return float(f"{value:.{digits}g}")
    return value
