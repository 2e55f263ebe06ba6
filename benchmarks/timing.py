"""Time contenders in turn, so that a disturbance hits them all, and compare their times."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax

# How many times, at least, a batch crosses the memory bus if caches hold none of it: training reads
# it for its moments, reads it again to normalize, and writes the output; the backward pass reads it
# and the cotangent for two sums, reads both again, and writes the gradient.
FLOOR_PASSES = {"forward": 3, "forward_backward": 8, "evaluate": 2}


def turn_by_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    at_least: int = 7,
    at_most: int = 31,
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of every call: `at_least` rounds, and more until `seconds` have passed.

    This waits for JAX arrays. A call that returns anything else must wait by itself.
    """
    for call in calls.values():  # Compile and allocate before the clock runs.
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
            del result  # Free it while no clock runs.
    return times


def order(names: Sequence[str], k: int) -> list[str]:
    """Rotate the names, and reverse them in every other round.

    Each comes first in turn, and none always follows the same one.
    """
    at = k // 2 % len(names)
    rotated = [*names[at:], *names[:at]]
    return rotated[::-1] if k % 2 else rotated


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median ratio of times of the same round."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def floor_fraction(times: Sequence[float], copies: Sequence[float], kind: str) -> float:
    """Return the least time that the traffic of `kind` takes, over the time it took.

    A copy is two passes over memory, so half of its time is that of one pass.
    """
    return FLOOR_PASSES[kind] / 2 * median_ratio(copies, times)


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)
