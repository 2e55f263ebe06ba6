"""Times of two functions that are compared: both in every round, so that both are disturbed."""

import statistics
import time
from collections.abc import Callable, Sequence

import jax

MOST_ROUNDS = 1001
LEAST_ROUNDS = 7
SECONDS = 2.0


def alternate(
    first: Callable[[], object], second: Callable[[], object]
) -> tuple[list[float], list[float]]:
    """Return the seconds that each function takes in every round, for about `SECONDS` in all.

    Both are called once before that, to compile. Which of them begins a round alternates.
    """
    calls = (first, second)
    jax.block_until_ready([call() for call in calls])
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            jax.block_until_ready(calls[which]())
            times[which].append(time.perf_counter() - start)
    return times


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median of the ratios of the two times of each round."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))
