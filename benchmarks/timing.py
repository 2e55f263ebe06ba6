"""Times taken turn by turn, so that what disturbs one contender disturbs them all, and ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax

# Times a batch crosses the memory bus at least, where caches hold none of it: training reads it for
# its moments, reads it again to normalize, and writes the output; the backward pass reads it and
# the cotangent for two sums, reads both again, and writes the gradient.
FLOOR_PASSES = {"forward": 3, "forward_backward": 8, "evaluate": 2}


def turn_by_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    at_least: int = 7,
    at_most: int = 31,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every call in every round: `at_least` rounds, more while `seconds` last.

    Arrays of JAX are waited for; a call that returns anything else must wait by itself.
    """
    for call in calls.values():  # compiled, and memory taken, before the clock runs
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = clock()
    for k in range(at_most):
        if k >= at_least and clock() - begin > seconds:
            break
        for name in order(list(calls), k):
            start = clock()
            result = jax.block_until_ready(calls[name]())
            times[name].append(clock() - start)
            del result  # freed outside of everybody's time
    return times


def order(names: Sequence[str], k: int) -> list[str]:
    """Rotated, so that each comes first in turn, and every other time backwards, so that none
    always follows the same one."""
    at = k // 2 % len(names)
    rotated = [*names[at:], *names[:at]]
    return rotated[::-1] if k % 2 else rotated


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """The median of the ratios of pairs of one round."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def floor_fraction(times: Sequence[float], copies: Sequence[float], kind: str) -> float:
    """The least time that the traffic of `kind` takes, by a copy's two passes, over the time."""
    return FLOOR_PASSES[kind] / 2 * median_ratio(copies, times)


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)
