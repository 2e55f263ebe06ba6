"""Find faults in the running statistics of a layer without data."""

from collections.abc import Iterator

import numpy as np

from jaxbn.health._finding import Finding


def impossible_values(path: str, mean: np.ndarray, var: np.ndarray) -> Iterator[Finding]:
    """Yield a finding for values that are not finite, and one for variances below zero."""
    for name, value in (("mean", mean), ("variance", var)):
        bad = ~np.isfinite(value)
        if np.any(bad):
            yield Finding(
                path,
                "non-finite",
                f"The running {name} of {features(bad)} is not finite. A batch contained NaN or "
                f"infinity, from which a running average never recovers. Load older statistics or "
                f"recalibrate (jaxbn.calibrate.recalibrate), and train with jaxbn.keep_finite.",
            )
    negative = var < 0
    if np.any(negative):
        yield Finding(
            path,
            "negative-variance",
            f"The running variance of {features(negative)} is negative, as low as "
            f"{np.nanmin(var):.3g}. Either it was computed as E[x^2] - E[x]^2, which cancels if "
            f"the mean is far from zero, or the statistics were averaged or loaded incorrectly. "
            f"Recalibrate them (jaxbn.calibrate.recalibrate).",
        )


def small_variances(path: str, var: np.ndarray, epsilon: float) -> Iterator[Finding]:
    """Yield a finding for variances in [0, epsilon), which dead features have."""
    small = is_small(var, epsilon)
    if np.any(small):
        yield Finding(
            path,
            "dead-features",
            f"The running variance of {features(small)} is below epsilon ({epsilon:g}). These "
            f"inputs are almost constant, and the layer divides them by sqrt(epsilon) instead of "
            f"their standard deviation. Look for dead units, or for pruned or zero-initialized "
            f"channels, in the layer before. If the inputs are small on purpose, use a smaller "
            f"epsilon.",
        )


def is_small(var: np.ndarray, epsilon: float) -> np.ndarray:
    """Return which variances are in [0, epsilon)."""
    return (var >= 0) & (var < epsilon)


def as_initialized(mean: np.ndarray, var: np.ndarray) -> bool:
    """Return whether all means are 0 and all variances are 1, as after initialization."""
    return bool(np.all(mean == 0) and np.all(var == 1))


def features(which: np.ndarray) -> str:
    """Return as text how many features are selected, and the index of the first."""
    first = feature(which.shape, int(np.argmax(which)))
    return f"{np.count_nonzero(which)} of {which.size} features (the first: {first})"


def feature(shape: tuple[int, ...], flat_index: int) -> str:
    """Return the index of a feature as text: a number, or a tuple if there are several axes."""
    index = tuple(int(i) for i in np.unravel_index(flat_index, shape))
    return str(index[0] if len(index) == 1 else index)
