"""Seconds of training forward, forward and backward, and evaluation, of one layer."""

import gc
import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.contenders import Arrays, Problem, available
from benchmarks.settings import Settings

# Height (and width) and features of ResNet-50's batch norms (He et al., 2015, table 1).
RESNET50 = [
    (112, 64),
    *[(56, 64), (56, 256)],
    *[(28, 128), (28, 512)],
    *[(14, 256), (14, 1024)],
    *[(7, 512), (7, 2048)],
]
# Features last. The last two are the exercise's, whose images have them first: (64, 16, 32, 32).
SHAPES = [
    *[(32, size, size, features) for size, features in RESNET50],
    (8192, 512),
    (64, 128),
    (64, 32, 32, 16),
]
QUICK_SHAPES = [(4, 14, 14, 64)]
# Less is copied in the time that it takes to start a program: no measure of memory.
LEAST_BYTES_OF_A_FLOOR = 4_000_000
DTYPES = ["float32", "bfloat16"]
PASSES = list(timing.FLOOR_PASSES)


def problems(shapes: list[tuple[int, ...]]) -> list[tuple[str, Problem]]:
    """Layouts and problems. An (N, C) batch has one layout, and stands with those features last."""
    found = []
    for shape, dtype in itertools.product(shapes, DTYPES):
        found.append(("NHWC", Problem(shape, -1, dtype)))
        if len(shape) > 2:
            features_first = (shape[0], shape[-1], *shape[1:-1])
            found.append(("NCHW", Problem(features_first, 1, dtype)))
    return found


def arrays(problem: Problem, mean: float = 0.0) -> Arrays:
    """A batch of N(mean, 1)."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(problem.shape, np.float32) for _ in range(2))
    x += np.float32(mean)
    scale, bias = rng.uniform(0.5, 2, (2, problem.shape[problem.axis])).astype(np.float32)
    x, dy = (jnp.asarray(v, problem.dtype) for v in (x, dy))
    return Arrays(x, dy, jnp.asarray(scale), jnp.asarray(bias))


@jax.jit
def copy(x: jax.Array) -> jax.Array:
    """Reads and writes every bit once. A plain copy may run on one thread where this takes all."""
    return ~x.view(f"uint{8 * x.dtype.itemsize}")


def time_problem(problem: Problem, makers: dict, settings: Settings) -> list[dict[str, Any]]:
    """One record for each pass and contender."""
    data = arrays(problem, settings.mean)
    contenders = {name: make(problem) for name, make in makers.items()}
    batches = {name: contender.put(data) for name, contender in contenders.items()}
    budget: dict[str, Any] = (
        {"at_least": 3, "at_most": 9, "seconds": 0.1} if settings.quick else {"seconds": 1.0}
    )
    records = []
    has_floor = data.x.nbytes >= LEAST_BYTES_OF_A_FLOOR
    for kind in PASSES:
        calls: dict[str, Callable[[], object]] = {
            name: partial(getattr(contender, kind), batches[name])
            for name, contender in contenders.items()
        }
        calls["copy"] = partial(copy, data.x)
        times = timing.turn_by_turn(calls, **budget)
        for name in contenders:
            records.append(
                {
                    "shape": list(problem.shape),
                    "dtype": problem.dtype,
                    "pass": kind,
                    "contender": name,
                    "rounds": len(times[name]),
                    "seconds": statistics.median(times[name]),
                    "copy_seconds": statistics.median(times["copy"]),
                    "ours_over_it": timing.median_ratio(times["ours"], times[name]),
                    "of_floor": timing.floor_fraction(times[name], times["copy"], kind)
                    if has_floor
                    else None,
                }
            )
    return records


def summarize(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric means over shapes, for each layout, type, pass and contender."""
    keys = ("layout", "dtype", "pass", "contender")
    groups: dict[tuple, list] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    summary = []
    for key, group in groups.items():
        fractions = [one["of_floor"] for one in group if one["of_floor"] is not None]
        summary.append(
            {
                **dict(zip(keys, key, strict=True)),
                "shapes": len(group),
                "ours_over_it": timing.geometric_mean([one["ours_over_it"] for one in group]),
                "of_floor": timing.geometric_mean(fractions) if fractions else None,
            }
        )
    return summary


def touch_memory(bytes_: int) -> None:
    """Has the C library take so much from the system, and keep it (see __main__.py), so that no
    contender is the first to touch a page. Not by NumPy, which asks for huge pages."""
    block = b"x" * bytes_
    del block


def measure(settings: Settings) -> dict[str, Any]:
    makers, missing = available()
    records = []
    todo = problems(QUICK_SHAPES if settings.quick else SHAPES)
    if jax.default_backend() == "cpu":
        touch_memory(20 * max(4 * math.prod(problem.shape) for _, problem in todo))
    for layout, problem in settings.track(todo, "speed"):
        found = time_problem(problem, makers, settings)
        records += [{"layout": layout, **record} for record in found]
        # A case's arrays and programs are gone before the next one's come.
        gc.collect()
        jax.clear_caches()
    return {
        "mean": settings.mean,
        "missing": missing,
        "summary": summarize(records),
        "cases": records,
    }
