"""Find the estimator and the epsilon behind the slopes of two layers."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ESTIMATORS = ("biased", "unbiased")
_COMMON = (1e-5, 1e-3)
# The starting points of the search. Its results may lie between them.
_GRID = np.array([0.0] + [digit * 10.0**e for e in range(-10, 3) for digit in range(1, 10)])
_DIGITS = 6  # more cannot be measured in float32
_ITERATIONS = 10
_SLACK = 10  # a change counts if it is at least this many tolerances


class Slopes(NamedTuple):
    """The slopes of a layer and the variances that it divided by, each of shape (rows, C).

    `variances` has one entry per estimator.
    """

    slopes: np.ndarray
    variances: tuple[np.ndarray, np.ndarray]

    def log_scale(self, estimator: int, epsilon: float | np.ndarray) -> np.ndarray:
        """Return the logarithm of the scale that each slope implies."""
        return np.log(np.abs(self.slopes)) + np.log(self.variances[estimator] + epsilon) / 2


SlopesPair = tuple[Slopes, Slopes]
# An estimator for each layer, by its index.
EstimatorPair = tuple[int, int]


def simplest_fit(
    layers: SlopesPair, same_scale: bool, tolerance: float, last_place: float
) -> list[tuple[str, float]] | None:
    """Return the estimator and epsilon of each layer: the simplest pair that explains the slopes.

    Equal epsilons are simpler than different ones, and then equal estimators. Epsilons are refined
    between the points of a grid. Among those that the rounding of the layers does not distinguish,
    the most common one is chosen, and then the decimal with the fewest digits.

    Args:
      layers: the slopes of the two layers.
      same_scale: whether both layers have the same scale.
      tolerance: the largest relative error of a slope that counts as explained.
      last_place: the relative rounding error of the outputs.
    """
    limits = np.array([_largest_epsilon(layer, same_scale, tolerance) for layer in layers])
    within = np.all(np.stack(np.meshgrid(_GRID, _GRID, indexing="ij"), -1) <= limits, -1)
    on_diagonal = np.eye(len(_GRID), dtype=bool)
    pairs: list[EstimatorPair] = [(0, 0), (1, 1), (0, 1), (1, 0)]
    spreads = {pair: _spreads(layers, pair, same_scale) for pair in pairs}
    for same_epsilon, equal in itertools.product((True, False), (True, False)):
        options = []
        for pair in pairs[:2] if equal else pairs[2:]:
            spread = np.where(within & (on_diagonal == same_epsilon), spreads[pair], np.inf)
            near = np.argwhere(spread <= 2 * spread.min() + 4 * last_place)
            options += [(spread[i, j], pair, (_GRID[i], _GRID[j])) for i, j in near]
            start = np.unravel_index(np.argmin(spread), spread.shape)
            refined = _refine(layers, pair, _GRID[list(start)], limits, same_epsilon, same_scale)
            for epsilons in _decimals(refined, same_epsilon):
                options.append((_spread(layers, pair, epsilons, same_scale), pair, epsilons))
        least = min(spread for spread, _, _ in options)
        if least > tolerance:
            continue
        alike = [option for option in options if option[0] <= 2 * least + 4 * last_place]
        _, (a, b), (ours, theirs) = min(alike, key=lambda option: (_rank(*option[2]), option[0]))
        return [(ESTIMATORS[a], float(ours)), (ESTIMATORS[b], float(theirs))]
    return None


def _largest_epsilon(layer: Slopes, same_scale: bool, tolerance: float) -> float:
    """Return the epsilon beyond which no change of the variance shows, so any slopes would fit."""
    variances = layer.variances[0]
    change = variances.max() if same_scale else np.ptp(variances, 0).max()
    return max(*_COMMON, float(change) / (_SLACK * 2 * tolerance))


def _spreads(layers: SlopesPair, pair: EstimatorPair, same_scale: bool) -> np.ndarray:
    """Return by how much the scales of a feature differ, for each pair of epsilons of the grid."""
    logs = [
        layer.log_scale(estimator, _GRID[:, None, None])
        for layer, estimator in zip(layers, pair, strict=True)
    ]
    (low, high), (other_low, other_high) = ((log.min(1), log.max(1)) for log in logs)
    if same_scale:
        top = np.maximum(high[:, None], other_high[None])
        return (top - np.minimum(low[:, None], other_low[None])).max(-1)
    return np.maximum((high - low).max(-1)[:, None], (other_high - other_low).max(-1)[None])


def _spread(
    layers: SlopesPair, pair: EstimatorPair, epsilons: tuple[float, float], same_scale: bool
) -> float:
    """Return by how much the scales of a feature differ for one pair of epsilons."""
    logs = [layer.log_scale(pair[k], epsilons[k]) for k, layer in enumerate(layers)]
    groups = [np.concatenate(logs)] if same_scale else logs
    return max(float(np.ptp(log, 0).max()) for log in groups)


def _refine(
    layers: SlopesPair,
    pair: EstimatorPair,
    start: np.ndarray,
    limits: np.ndarray,
    same_epsilon: bool,
    same_scale: bool,
) -> tuple[float, float]:
    """Return the epsilons near `start` for which the scales agree best, by Gauss-Newton steps."""
    epsilons = np.array(start)
    limits = np.full(2, limits.min()) if same_epsilon else limits
    visited = []
    for _ in range(_ITERATIONS):
        visited.append((float(epsilons[0]), float(epsilons[1])))
        logs, derivatives = [], []
        for k, (layer, estimator) in enumerate(zip(layers, pair, strict=True)):
            log = layer.log_scale(estimator, epsilons[k])
            by = np.zeros((*log.shape, 2))
            by[..., k] = 0.5 / (layer.variances[estimator] + epsilons[k])
            logs.append(log)
            derivatives.append(by)
        if same_scale:
            logs, derivatives = [np.concatenate(logs)], [np.concatenate(derivatives)]
        # The scale is unknown, so only differences from its mean count.
        residual = np.concatenate([(log - log.mean(0)).ravel() for log in logs])
        slope = np.concatenate([(by - by.mean(0)).reshape(-1, 2) for by in derivatives])
        if same_epsilon:
            slope = slope.sum(1, keepdims=True)
        step, *_ = np.linalg.lstsq(slope, -residual, rcond=None)
        epsilons = np.clip(epsilons + step, 0, limits)
    return min(visited, key=lambda one: _spread(layers, pair, one, same_scale))


def _decimals(epsilons: tuple[float, float], same_epsilon: bool) -> Iterator[tuple[float, float]]:
    """Round the epsilons to every number of digits, both to the same value if they are the same."""
    ours, theirs = ([float(f"{e:.{n}g}") for n in range(1, _DIGITS + 1)] for e in epsilons)
    pairs = zip(ours, theirs, strict=True) if same_epsilon else itertools.product(ours, theirs)
    yield from dict.fromkeys(pair for pair in pairs if (pair[0] == pair[1]) == same_epsilon)


def _rank(*epsilons: float) -> int:
    """Rank epsilons: common ones first, then zero, powers of ten, and others by their digits."""
    rank = 0
    for epsilon in epsilons:
        digits = f"{epsilon:.{_DIGITS - 1}e}".split("e")[0].rstrip("0.")
        if min(abs(epsilon / common - 1) for common in _COMMON) < 1e-6:
            continue
        rank += 1 if epsilon == 0 else 2 if digits == "1" else 2 + len(digits.replace(".", ""))
    return rank
