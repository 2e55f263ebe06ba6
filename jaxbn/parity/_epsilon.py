"""Find the estimator and the epsilon behind the slopes of two layers."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ESTIMATORS = ("biased", "unbiased")
_COMMON = (1e-5, 1e-3)
# Where the search starts; what it returns may lie between these.
_GRID = np.array([0.0] + [digit * 10.0**e for e in range(-10, 3) for digit in range(1, 10)])
_DIGITS = 6  # float32 tells no more
_ITERATIONS = 10
_SLACK = 10  # how many tolerances a change has to be to count as one


class Slopes(NamedTuple):
    """The slopes of a layer, and the variances behind them under each estimator: (rows, C) each."""

    slopes: np.ndarray
    variances: tuple[np.ndarray, np.ndarray]

    def log_scale(self, estimator: int, epsilon: float | np.ndarray) -> np.ndarray:
        """What each slope says that the logarithm of the scale is."""
        return np.log(np.abs(self.slopes)) + np.log(self.variances[estimator] + epsilon) / 2


Sides = tuple[Slopes, Slopes]
Pair = tuple[int, int]


def plainest(
    sides: Sides, shared: bool, tolerance: float, unit: float
) -> list[tuple[str, float]] | None:
    """Return the estimator and epsilon of each side, of the plainest kind that explains the slopes.

    Plainest: equal epsilons before unequal ones, and then equal estimators. Epsilons are refined
    between the points of a grid. Among those that the rounding of the layers cannot tell apart, the
    commonest is taken, and then the decimal with the fewest digits.

    Args:
      sides: the slopes of the two layers.
      shared: whether both layers have the same scale.
      tolerance: the largest relative error of a slope that counts as explained.
      unit: the relative rounding error of the outputs.
    """
    limits = np.array([_largest_epsilon(side, shared, tolerance) for side in sides])
    within = np.all(np.stack(np.meshgrid(_GRID, _GRID, indexing="ij"), -1) <= limits, -1)
    on_diagonal = np.eye(len(_GRID), dtype=bool)
    pairs: list[Pair] = [(0, 0), (1, 1), (0, 1), (1, 0)]
    spreads = {pair: _spreads(sides, pair, shared) for pair in pairs}
    for same, equal in itertools.product((True, False), (True, False)):
        options = []
        for pair in pairs[:2] if equal else pairs[2:]:
            spread = np.where(within & (on_diagonal == same), spreads[pair], np.inf)
            near = np.argwhere(spread <= 2 * spread.min() + 4 * unit)
            options += [(spread[i, j], pair, (_GRID[i], _GRID[j])) for i, j in near]
            start = np.unravel_index(np.argmin(spread), spread.shape)
            refined = _refine(sides, pair, _GRID[list(start)], limits, same, shared)
            for epsilons in _decimals(refined, same):
                options.append((_spread(sides, pair, epsilons, shared), pair, epsilons))
        least = min(spread for spread, _, _ in options)
        if least > tolerance:
            continue
        alike = [option for option in options if option[0] <= 2 * least + 4 * unit]
        _, (a, b), (ours, theirs) = min(alike, key=lambda option: (_rank(*option[2]), option[0]))
        return [(ESTIMATORS[a], float(ours)), (ESTIMATORS[b], float(theirs))]
    return None


def _largest_epsilon(side: Slopes, shared: bool, tolerance: float) -> float:
    """The epsilon beside which no change of the variance shows, so that any slopes would fit."""
    variances = side.variances[0]
    change = variances.max() if shared else np.ptp(variances, 0).max()
    return max(*_COMMON, float(change) / (_SLACK * 2 * tolerance))


def _spreads(sides: Sides, pair: Pair, shared: bool) -> np.ndarray:
    """How far the scales of a feature disagree, for each pair of epsilons of the grid."""
    logs = [
        side.log_scale(estimator, _GRID[:, None, None])
        for side, estimator in zip(sides, pair, strict=True)
    ]
    (low, high), (other_low, other_high) = ((log.min(1), log.max(1)) for log in logs)
    if shared:
        top = np.maximum(high[:, None], other_high[None])
        return (top - np.minimum(low[:, None], other_low[None])).max(-1)
    return np.maximum((high - low).max(-1)[:, None], (other_high - other_low).max(-1)[None])


def _spread(sides: Sides, pair: Pair, epsilons: tuple[float, float], shared: bool) -> float:
    """The same for one pair of epsilons."""
    logs = [side.log_scale(pair[k], epsilons[k]) for k, side in enumerate(sides)]
    groups = [np.concatenate(logs)] if shared else logs
    return max(float(np.ptp(log, 0).max()) for log in groups)


def _refine(
    sides: Sides, pair: Pair, start: np.ndarray, limits: np.ndarray, same: bool, shared: bool
) -> tuple[float, float]:
    """The epsilons near `start` under which the scales agree best, by Gauss and Newton's method."""
    epsilons = np.array(start)
    limits = np.full(2, limits.min()) if same else limits
    visited = []
    for _ in range(_ITERATIONS):
        visited.append((float(epsilons[0]), float(epsilons[1])))
        logs, derivatives = [], []
        for k, (side, estimator) in enumerate(zip(sides, pair, strict=True)):
            log = side.log_scale(estimator, epsilons[k])
            by = np.zeros((*log.shape, 2))
            by[..., k] = 0.5 / (side.variances[estimator] + epsilons[k])
            logs.append(log)
            derivatives.append(by)
        if shared:
            logs, derivatives = [np.concatenate(logs)], [np.concatenate(derivatives)]
        # The scale is not known: only differences from its mean count.
        residual = np.concatenate([(log - log.mean(0)).ravel() for log in logs])
        slope = np.concatenate([(by - by.mean(0)).reshape(-1, 2) for by in derivatives])
        if same:
            slope = slope.sum(1, keepdims=True)
        step, *_ = np.linalg.lstsq(slope, -residual, rcond=None)
        epsilons = np.clip(epsilons + step, 0, limits)
    return min(visited, key=lambda one: _spread(sides, pair, one, shared))


def _decimals(epsilons: tuple[float, float], same: bool) -> Iterator[tuple[float, float]]:
    """The epsilons rounded to any number of digits, alike where they are the same."""
    ours, theirs = ([float(f"{e:.{n}g}") for n in range(1, _DIGITS + 1)] for e in epsilons)
    pairs = zip(ours, theirs, strict=True) if same else itertools.product(ours, theirs)
    yield from dict.fromkeys(pair for pair in pairs if (pair[0] == pair[1]) == same)


def _rank(*epsilons: float) -> int:
    """How unusual epsilons are: the common ones, zero, powers of ten, and then by their digits."""
    rank = 0
    for epsilon in epsilons:
        digits = f"{epsilon:.{_DIGITS - 1}e}".split("e")[0].rstrip("0.")
        if min(abs(epsilon / common - 1) for common in _COMMON) < 1e-6:
            continue
        rank += 1 if epsilon == 0 else 2 if digits == "1" else 2 + len(digits.replace(".", ""))
    return rank
