"""Measure the seconds of one layer: training forward, forward and backward, and evaluation."""

import argparse
import gc
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.contenders import Arrays, Contender, Problem, available
from benchmarks.settings import Settings

# Height (and width) and features of batch norms of ResNet-50 (He et al., 2015, table 1): the stem,
# the wide layers of every stage, and the narrow ones of the first and the third.
RESNET50 = [(112, 64), (56, 64), (56, 256), (28, 512), (14, 256), (14, 1024), (7, 2048)]
SHAPES = [*[(32, size, size, features) for size, features in RESNET50], (8192, 512)]
QUICK_SHAPES = [(4, 14, 14, 64)]
# Copying less than this takes no longer than starting a program, and does not measure memory.
LEAST_BYTES_OF_A_FLOOR = 4_000_000
DTYPES = ["float32", "bfloat16"]
PASSES = list(timing.FLOOR_PASSES)
# What the input and the running statistics hold.
DATA = {
    "settled": "the means of the features drawn from N(0, 1), deviation 1, as networks have it; "
    "the running statistics are the batch's",
    "standard": "N(0, 1); the running statistics are the batch's",
    "far": "N(5, 1); the running statistics are the batch's",
    "fresh": "the input of settled; the running statistics are those of a new layer, 0 and 1",
}


def data_names(text: str) -> tuple[str, ...]:
    """Parse the names of data that the command line gives, separated by commas."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := set(names) - set(DATA):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: the data are {', '.join(DATA)}"
        )
    return names


def problems(shapes: list[tuple[int, ...]]) -> list[tuple[str, Problem]]:
    """Return layouts and problems. An (N, C) batch counts as one with features last."""
    found = []
    for shape, dtype in itertools.product(shapes, DTYPES):
        found.append(("NHWC", Problem(shape, -1, dtype)))
        if len(shape) > 2:
            features_first = (shape[0], shape[-1], *shape[1:-1])
            found.append(("NCHW", Problem(features_first, 1, dtype)))
    return found


def arrays(problem: Problem, data: str = "settled") -> Arrays:
    """Return a batch, parameters and running statistics of a kind of `DATA`."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(problem.shape, np.float32) for _ in range(2))
    features = x.shape[problem.axis]
    scale, bias = rng.uniform(0.5, 2, (2, features)).astype(np.float32)
    constant = {"standard": 0.0, "far": 5.0}
    np.moveaxis(x, problem.axis, -1)[...] += (
        constant[data] if data in constant else rng.standard_normal(features, np.float32)
    )
    x, dy = (jnp.asarray(v, problem.dtype) for v in (x, dy))
    if data == "fresh":
        mean, var = jnp.zeros(features), jnp.ones(features)
    else:
        axes = tuple(a for a in range(x.ndim) if a != problem.axis % x.ndim)
        mean, var = (moment(x, axes, dtype=jnp.float32) for moment in (jnp.mean, jnp.var))
    return Arrays(x, dy, jnp.asarray(scale), jnp.asarray(bias), mean, var)


@jax.jit
def copy(x: jax.Array) -> jax.Array:
    """Read and write every bit once, on all threads, whereas a plain copy may run on one."""
    return ~x.view(f"uint{8 * x.dtype.itemsize}")


def time_problem(problem: Problem, makers: dict, settings: Settings) -> list[dict[str, Any]]:
    """Return one record for each kind of data, pass and contender."""
    contenders = {name: make(problem) for name, make in makers.items()}
    return [
        {"data": data, "shape": list(problem.shape), "dtype": problem.dtype, **record}
        for data in settings.data
        for record in time_data(arrays(problem, data), contenders, settings.quick)
    ]


def time_data(
    given: Arrays, contenders: dict[str, Contender], quick: bool
) -> Iterator[dict[str, Any]]:
    # Only PyTorch keeps the statistics that it updates: those of "fresh" change while it is timed,
    # which does not affect its time.
    batches = {name: contender.put(given) for name, contender in contenders.items()}
    budget: dict[str, Any] = (
        {"at_least": 3, "at_most": 9, "seconds": 0.1} if quick else {"seconds": 1.0}
    )
    has_floor = given.x.nbytes >= LEAST_BYTES_OF_A_FLOOR
    for kind in PASSES:
        calls: dict[str, Callable[[], object]] = {
            name: partial(getattr(contender, kind), batches[name])
            for name, contender in contenders.items()
        }
        calls["copy"] = partial(copy, given.x)
        times = timing.turn_by_turn(calls, **budget)
        for name in contenders:
            yield {
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


def summarize(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return geometric means over shapes, for each kind of data, layout, type and so on."""
    keys = ("data", "layout", "dtype", "pass", "contender")
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
    """Let the C library allocate this much memory and keep it, as __main__.py configures it.

    No contender is then the first to touch a page. NumPy would ask for huge pages instead.
    """
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
        # Free the arrays and programs of a case before the next one.
        gc.collect()
        jax.clear_caches()
    return {
        "data": {name: DATA[name] for name in settings.data},
        "missing": missing,
        "summary": summarize(records),
        "cases": records,
    }
