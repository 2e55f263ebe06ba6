"""Explain why running statistics are far from the exact ones."""

import math

import numpy as np

from jaxbn.calibrate._called_layers import LayerFacts
from jaxbn.health._alone import ClosestBatch
from jaxbn.health._distance import LARGEST_HEALTHY, State, distance

# An explanation must leave at most this share of the distance.
_UNEXPLAINED = 1 / 3


def cause(running: State, exact: State, facts: LayerFacts, closest: ClosestBatch) -> str:
    """Return the most likely cause, and what to do, in sentences.

    Args:
      running: the running statistics.
      exact: those of the data.
      facts: the layer's options.
      closest: the batch whose own statistics are closest to the running ones.
    """
    far = distance(running, exact, facts.epsilon)
    if _explains(closest.distance, far):
        which = "the last batch" if closest.is_last else f"batch {closest.batch}"
        return (
            f"They match {which} alone, so almost all weight is on the newest batch. The "
            f"momentum may be inverted: here it is the weight of the old value, so PyTorch's 0.1 "
            f"is 0.9. Fix the momentum, and recalibrate (jaxbn.calibrate.recalibrate)."
        )
    lag = _weight_of_initialization(running, exact, facts.epsilon)
    with_lag = State(
        mean=(1 - lag) * exact.mean, var=lag * np.ones_like(exact.var) + (1 - lag) * exact.var
    )
    if 0 < lag < 1 and _explains(distance(running, with_lag, facts.epsilon), far):
        return (
            f"They lag: the initial values, mean 0 and variance 1, still have "
            f"{100 * lag:.3g} % of the weight{_updates(lag, facts.momentum)}. Train longer, "
            f"lower the momentum, or recalibrate (jaxbn.calibrate.recalibrate)."
        )
    return (
        "They come from other data: another domain, other preprocessing, or weights that have "
        "changed since. Preprocess the inputs as in training. If they are right, recalibrate "
        "(jaxbn.calibrate.recalibrate)."
    )


def _explains(remaining: float, far: float) -> bool:
    return remaining <= min(far * _UNEXPLAINED, LARGEST_HEALTHY)


def _weight_of_initialization(running: State, exact: State, epsilon: float) -> float:
    r"""Return the weight `a` of mean 0 and variance 1 that fits the running statistics best.

    It solves, by least squares in units of the running deviations,

    .. math::

        \mu_r - \mu_e = -a \mu_e, \quad \sigma_r^2 - \sigma_e^2 = a (1 - \sigma_e^2)
    """
    with np.errstate(all="ignore"):
        var = running.var + epsilon
        std = np.sqrt(var)
        slope = np.stack([-exact.mean / std, (1 - exact.var) / var])
        moved = np.stack([(running.mean - exact.mean) / std, (running.var - exact.var) / var])
        # If there is nothing to fit, the weight is NaN, which is never accepted as a cause.
        return float(np.sum(slope * moved) / np.sum(slope**2))


def _updates(lag: float, momentum: float | None) -> str:
    if momentum is None or not 0 < (number := float(momentum)) < 1:
        return ""
    updates = max(round(math.log(lag) / math.log(number)), 1)
    return f", as after about {updates} updates with momentum {number:g}"
