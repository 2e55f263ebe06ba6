"""The probes of `identify`: each feeds a layer batches that tell one part of its convention."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax.numpy as jnp
import numpy as np

from jaxbn.parity._layer import Layer

SIZES = (2, 3, 16)  # n / (n - 1) is 2, 1.5 and 1.07: the estimators are far apart
_TINY = 1e-6  # a deviation that shrinks the running variance without being zero
_TRACKING_STEPS, _SHRINKING_STEPS = 8, 64
_MANY = 5  # different numbers that fit into half precision: of float32, hardly one does


class ConventionError(ValueError):
    """A layer whose convention is none of `batch_norm`'s.

    Attributes:
      probe: which part of the layer does not fit, such as "running mean" or "evaluation".
      reason: what was measured there, and what would fit.
      found: what is known of the convention. It holds all four keywords, and what `batch_norm` has
        no keyword for, where the layer is understood but cannot be expressed.
    """

    def __init__(self, probe: str, reason: str, found: Mapping[str, Any]):
        known = ", ".join(f"{name}={value!r}" for name, value in found.items())
        super().__init__(
            f"the layer follows no convention of batch_norm: {probe}: {reason}. "
            f"Found besides: {known or 'nothing'}."
        )
        self.probe, self.reason, self.found = probe, reason, dict(found)


class Averages(NamedTuple):
    """How the running statistics move: running <- (1 - weight) running + weight batch.

    With the weight 1/s, a constant momentum m (s = 1 / (1 - m)), the cumulative average (s counts
    batches) and a bias-corrected one all follow s <- 1 + decay * s.
    """

    kind: str
    decay: float
    s: float
    steps: int

    def weight(self, step: int) -> float:
        s = self.s
        for _ in range(step - self.steps):
            s = 1 + self.decay * s
        return 1 / s


class Normalization(NamedTuple):
    """The line from input to output: the layer's parameters, epsilon and where it is added."""

    scale: np.ndarray
    bias: np.ndarray
    epsilon: float
    inside: bool
    estimator: str

    def slope(self, var: np.ndarray) -> np.ndarray:
        if self.inside:
            return self.scale / np.sqrt(var + self.epsilon)
        return self.scale / (np.sqrt(var) + self.epsilon)


class Box:
    """The layer, with what it returns checked and in float64."""

    def __init__(self, layer: Layer, num_features: int):
        self.layer, self.num_features = layer, num_features
        self.probe, self.steps = "", 0
        self.found: dict[str, Any] = {}
        # The narrow dtypes that all outputs so far fit into.
        self.narrow = {jnp.bfloat16, jnp.float16}
        self.outputs: set[float] = set()

    def fail(self, reason: str) -> NoReturn:
        if self.narrow and len(self.outputs) >= _MANY:
            names = " or ".join(sorted(np.dtype(dtype).name for dtype in self.narrow))
            reason = f"it computes in {names}, too coarse to tell; probe a copy of it in float32"
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
            self.fail(f"{name}(x) has shape {y.shape} where x has {x.shape}")
        if not np.isfinite(y).all():
            self.fail(f"{name}(x) is not finite on values between {x.min():.3g} and {x.max():.3g}")
        with np.errstate(over="ignore"):
            self.narrow = {t for t in self.narrow if np.array_equal(y.astype(t).astype(float), y)}
        self.outputs |= set(y.flat) if self.narrow else set()
        return y


def batch(size: int, center: Any, deviation: Any, num_features: int) -> np.ndarray:
    """Values around `center`, with a mean that is exact where that is zero; float32."""
    pattern = np.array([-1, 0, 1]) * 1.5**0.5 if size == 3 else np.resize([-1.0, 1.0], size)
    center, deviation = (np.broadcast_to(v, num_features) for v in (center, deviation))
    return (center + pattern[:, None] * deviation).astype(np.float32)


def correction(estimator: str, size: int) -> float:
    """The estimator's value over the biased one's."""
    return size / (size - 1) if estimator == "unbiased" else 1.0


def track(box: Box) -> Averages:
    """The momentum from the running mean, and with it the estimator of the running variance."""
    box.probe = "running mean"
    mean, var = box.running()
    deviation = 3 * np.maximum(np.maximum(1, np.sqrt(var)), np.abs(mean) / 10)
    weights, factors, sizes = [], [], []
    for step in range(_TRACKING_STEPS):
        size = SIZES[step % len(SIZES)]
        x = batch(size, (-1) ** step * 10 * deviation, deviation, box.num_features)
        batch_mean, batch_var = x.mean(0, np.float64), x.var(0, np.float64)
        box.train(x)
        new_mean, new_var = box.running()
        each = (new_mean - mean) / (batch_mean - mean)
        weight = float(np.median(each))
        if weight < 1e-4:
            box.fail(
                f"a training step moves it by {weight:.2g} of the way to the batch's mean, too "
                "little to tell a momentum (a layer that is frozen, or momentum 1?)"
            )
        if np.abs(each - weight).max() > 1e-4 * weight + 1e-5:
            box.fail(f"it moves by {each.min():.4g} to {each.max():.4g}, unlike between features")
        weights.append(weight)
        factors.append((new_var - (1 - weight) * var) / weight / batch_var)
        sizes.append(size)
        mean, var = new_mean, new_var

    averages = _averages(box, weights)
    box.found["momentum"] = {
        "constant": shortest(averages.decay, 1e-3 * min(averages.decay, 1 - averages.decay) + 1e-6),
        "cumulative": None,
        "bias-corrected": shortest(averages.decay, 1e-3 * (1 - averages.decay)),
    }[averages.kind]
    if averages.kind == "bias-corrected":
        box.found["averages"] = "bias-corrected"

    box.probe = "running variance"
    # Where the correction forgets that the variance started from 1, only the first step shows it.
    first = 1 if averages.kind == "bias-corrected" else 0
    fits = {}
    for estimator in ("biased", "unbiased"):
        wanted = np.array([correction(estimator, size) for size in sizes])[:, None]
        fits[estimator] = (np.abs(np.array(factors) - wanted) < 0.02).all(1)
    for estimator, fit in fits.items():
        if fit[first:].all():
            box.found["running_variance"] = estimator
            if not fit.all():
                box.found["averages"] = "bias-corrected, with the initial variance left in"
            return averages
    measured = ", ".join(f"{np.median(f):.3g}" for f in factors[: len(SIZES)])
    box.fail(
        f"with the mean's momentum, batches of {SIZES} values enter it as {measured} times their "
        "biased variance; 1, 1, 1 is the biased one, 2, 1.5, 1.07 the unbiased one"
    )


def _averages(box: Box, weights: list[float]) -> Averages:
    s = 1 / np.array(weights)
    if np.ptp(s) <= 1e-3 + 2e-5 * s.max():
        middle = float(np.median(s))
        return Averages("constant", 1 - 1 / middle, middle, box.steps)
    decays = (s[1:] - 1) / s[:-1]
    decay = float(np.median(decays))
    if np.abs(decays - 1).max() < 3e-5:
        return Averages("cumulative", 1.0, float(s[-1]), box.steps)
    if 0 < decay < 1 and np.ptp(decays) < 1e-3 * decay:
        return Averages("bias-corrected", decay, float(s[-1]), box.steps)
    shown = ", ".join(f"{weight:.4g}" for weight in weights[:4])
    box.fail(
        f"successive batches enter it with the weights {shown} and so on, neither constant, nor "
        "those of a cumulative or a bias-corrected average"
    )


def normalize(box: Box) -> Normalization:
    """The estimator that normalizes, from batches of several sizes, and epsilon, from small ones.

    At one size the estimator's factor cannot be told from the scale; at several it can. Epsilon
    shows where the variance is near it, as a change in the slope that no scale can hide.
    """
    box.probe = "batch variance"
    largest = 30.0
    by_size = {size: _slope(box, batch(size, 0, largest, box.num_features)) for size in SIZES}
    slope, bias = by_size[SIZES[-1]]
    height = np.abs(slope) * largest
    signal = height / np.maximum(height + np.abs(bias), np.finfo(np.float32).tiny)
    if signal.max() < 1e-3:
        box.fail("no feature has a scale that shows beside its bias")
    usable = signal >= signal.max() / 10

    with np.errstate(divide="ignore", invalid="ignore"):  # what is no number fits no estimator
        ratios = np.array([np.median((slope / by_size[n][0])[usable] ** 2) for n in SIZES])
    for estimator in ("biased", "unbiased"):
        wanted = np.array([correction(estimator, size) for size in SIZES])
        if np.abs(ratios * wanted[-1] / wanted - 1).max() < 0.01:
            box.found["batch_variance"] = estimator
            break
    else:
        box.fail(
            f"batches of {SIZES} values are divided by {', '.join(f'{r:.3g}' for r in ratios)} "
            "times one variance; 1, 1, 1 is the biased one, 1.88, 1.41, 1 the unbiased one"
        )

    box.probe = "epsilon"
    factor = correction(estimator, SIZES[-1])
    variances = factor * 10.0 ** np.arange(3, -14, -1)
    steps = [batch(SIZES[-1], 0, (v / factor) ** 0.5, box.num_features) for v in variances]
    heights = np.abs([_slope(box, x)[0] * np.sqrt(factor * x.var(0, np.float64)) for x in steps])
    relative = heights[:, usable] / heights[0, usable]
    epsilon, inside = _epsilon(box, variances, relative)
    box.found["epsilon"] = shortest(epsilon, 0.01 * epsilon)
    if not inside:
        box.found["epsilon_added_to"] = "the standard deviation"

    variance = np.full(box.num_features, factor * largest**2)
    unit = Normalization(np.ones_like(bias), bias, box.found["epsilon"], inside, estimator)
    return unit._replace(scale=slope / unit.slope(variance))


def _slope(box: Box, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and bias of a training step's output over a batch around zero."""
    y = box.train(x)
    x = x.astype(np.float64)
    bias = y.mean(0)
    slope = (x * y).sum(0) / (x * x).sum(0)
    rest = np.abs(y - bias - slope * x).max(0)
    if (rest > 1e-3 * (np.abs(slope) * np.abs(x).max() + np.abs(bias)) + 1e-30).any():
        box.fail("the output is no linear function of a feature's values")
    return slope, bias


def _epsilon(box: Box, variances: np.ndarray, relative: np.ndarray) -> tuple[float, bool]:
    """Epsilon, and whether it is added to the variance, from (x - mean) / y at each variance.

    Its square is linear in the variance where epsilon is added to that, and it is itself linear in
    the deviation where epsilon is added to that. `relative` is one over it, times the deviation.
    """
    fits = []
    for inside, power in ((True, 2), (False, 1)):
        size = variances ** (power / 2)
        line = size[:, None] / np.maximum(relative, 1e-3) ** power  # slope * size + intercept
        found, misfit = [], 0.0
        for values, seen in zip(line.T, (relative > 0.1).T, strict=True):
            terms = np.stack([size, np.ones_like(size)], 1)[seen] / values[seen, None]
            at = np.abs(terms).max(0)
            (slope, intercept), *_ = np.linalg.lstsq(terms / at, np.ones(len(terms)), rcond=None)
            misfit = max(misfit, np.abs(terms / at @ [slope, intercept] - 1).max())
            found.append((intercept / at[1]) / (slope / at[0]) if slope > 0 else math.nan)
        epsilon = float(np.median(found))
        if np.ptp(found) > 0.05 * abs(epsilon):
            misfit = math.inf
        fits.append((misfit, epsilon, inside))
    if (relative[-1] > 0.99).all():
        box.fail(f"none shows, down to a variance of {variances[-1]:.0e}; batch_norm needs one")
    misfit, epsilon, inside = min(fits)
    if not misfit < 0.01:
        shown = ", ".join(f"{np.median(r):.2g}" for r in relative[::2])
        box.fail(
            "the outputs at falling variances fit no value added to the variance, nor to the "
            f"deviation; from 1e3 down by factors of 100, relative to the first: {shown}"
        )
    return epsilon, inside


def shrink(box: Box, epsilon: float) -> None:
    """Trains on next to nothing, until epsilon counts in evaluation or patience ends."""
    x = batch(SIZES[-1], 0, _TINY, box.num_features)
    for _ in range(_SHRINKING_STEPS):
        box.train(x)
        if box.running()[1].max() < 1e-3 * epsilon:
            return


def shortest(value: float, tolerance: float) -> float:
    """The decimal with the fewest digits that the measurement cannot tell from `value`."""
    for digits in range(1, 17):
        if abs(float(f"{value:.{digits}g}") - value) <= tolerance:
            return float(f"{value:.{digits}g}")
    return value
