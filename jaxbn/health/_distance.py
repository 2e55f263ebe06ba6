"""Compute the distance between running and exact statistics of a layer."""

from typing import Any, NamedTuple

import numpy as np

# Running statistics at a larger distance are off. This is half of the standard deviation of
# normalized outputs, which is 1. The statistics of a single random batch of 16 values, which result
# from momentum 0, are closer: their mean scatters by 1 / sqrt(16) standard deviations, and their
# standard deviation, for normal data, by 1 / sqrt(2 * 16). That is a distance of about
# sqrt(1.5 / 16) = 0.31.
LARGEST_HEALTHY = 0.5


class State(NamedTuple):
    """The tracked mean and variance of a layer, in float64."""

    mean: np.ndarray
    var: np.ndarray

    @classmethod
    def of(cls, mean: Any, var: Any) -> "State":
        if np.iscomplexobj(mean):
            raise TypeError(
                f"variables must have real running means: the health of batch norms of complex "
                f"numbers cannot be checked, got a mean of {mean.dtype}."
            )
        return cls(np.asarray(mean, np.float64), np.asarray(var, np.float64))


def change(running: State, exact: State, epsilon: float) -> np.ndarray:
    r"""Return, for each feature, the RMS change of the normalized output over the data.

    With :math:`s = \sqrt{\sigma^2 + \epsilon}`, `running` r and `exact` e, the change is

    .. math::

        \frac{x - \mu_r}{s_r} - \frac{x - \mu_e}{s_e}
            = \frac{\mu_e - \mu_r}{s_r} + \frac{x - \mu_e}{s_e} \left(\frac{s_e}{s_r} - 1\right)

    and its mean square over data with the exact statistics is

    .. math::

        \left(\frac{\mu_e - \mu_r}{s_r}\right)^2
            + \frac{\sigma_e^2}{s_e^2} \left(\frac{s_e}{s_r} - 1\right)^2

    Values that are not finite, and variances below -epsilon, give NaN.
    """
    with np.errstate(all="ignore"):
        std_running, std_exact = (np.sqrt(state.var + epsilon) for state in (running, exact))
        shift = (exact.mean - running.mean) / std_running
        stretch = np.sqrt(exact.var) / std_exact * (std_exact / std_running - 1)
        # With a variance and an epsilon of zero, this divides zero by zero.
        is_equal, is_constant = exact.mean == running.mean, exact.var == 0
        shift, stretch = np.where(is_equal, 0, shift), np.where(is_constant, 0, stretch)
        return np.sqrt(shift**2 + stretch**2)


def distance(running: State, exact: State, epsilon: float) -> float:
    """Return the RMS change of the normalized output over the data and the features."""
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.mean(change(running, exact, epsilon) ** 2)))


def mean_difference(running: State, exact: State, epsilon: float) -> np.ndarray:
    """Return, for each feature, the difference of the means in standard deviations of the data."""
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
