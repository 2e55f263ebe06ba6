"""The distance of a layer's running statistics from the exact ones."""

from typing import Any, NamedTuple

import numpy as np

# Running statistics at a larger distance are off. A change of this size is half of what is normal:
# normalized outputs have the deviation 1. Below it are the statistics of a single random batch of
# 16 values, which momentum 0 leaves: their means scatter by 1 / sqrt(16) deviations and, for normal
# data, their deviations by 1 / sqrt(2 * 16), a distance of about sqrt(1.5 / 16) = 0.31.
LARGEST_HEALTHY = 0.5


class State(NamedTuple):
    """The mean and variance of a layer as it tracks them, in float64."""

    mean: np.ndarray
    var: np.ndarray

    @classmethod
    def of(cls, mean: Any, var: Any) -> "State":
        return cls(np.asarray(mean, np.float64), np.asarray(var, np.float64))


def change(running: State, exact: State, epsilon: float) -> np.ndarray:
    r"""Return, for each feature, the RMS change of the normalized output over the data.

    With :math:`s = \sqrt{\sigma^2 + \epsilon}`, `running` r and `exact` e, normalization gives

    .. math::

        \frac{x - \mu_r}{s_r} - \frac{x - \mu_e}{s_e}
            = \frac{\mu_e - \mu_r}{s_r} + \frac{x - \mu_e}{s_e} \left(\frac{s_e}{s_r} - 1\right)

    whose mean square over data with the exact statistics is

    .. math::

        \left(\frac{\mu_e - \mu_r}{s_r}\right)^2
            + \frac{\sigma_e^2}{s_e^2} \left(\frac{s_e}{s_r} - 1\right)^2

    Values that are not finite, and negative variances beyond epsilon, give NaN.
    """
    with np.errstate(all="ignore"):
        std_running, std_exact = (np.sqrt(state.var + epsilon) for state in (running, exact))
        shift = (exact.mean - running.mean) / std_running
        stretch = np.sqrt(exact.var) / std_exact * (std_exact / std_running - 1)
        # A deviation of zero, which needs an epsilon of zero, divides zero by zero.
        is_equal, is_constant = exact.mean == running.mean, exact.var == 0
        shift, stretch = np.where(is_equal, 0, shift), np.where(is_constant, 0, stretch)
        return np.sqrt(shift**2 + stretch**2)


def distance(running: State, exact: State, epsilon: float) -> float:
    """Return the RMS change of the normalized output over the data and the features."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(change(running, exact, epsilon) ** 2)))


def mean_difference(running: State, exact: State, epsilon: float) -> np.ndarray:
    """Return, for each feature, the difference of the means in deviations of the data."""
    with np.errstate(all="ignore"):
        return (running.mean - exact.mean) / np.sqrt(exact.var + epsilon)


def variance_ratio(running: State, exact: State, epsilon: float) -> np.ndarray:
    """Return, for each feature, the running variance over the exact one, each plus epsilon."""
    with np.errstate(all="ignore"):
        return (running.var + epsilon) / (exact.var + epsilon)


def worst_ratio(ratios: np.ndarray) -> int:
    """Return the flat index of the ratio that is farthest from one."""
    with np.errstate(all="ignore"):
        return int(np.argmax(np.nan_to_num(np.abs(np.log(ratios)), nan=np.inf)))
