"""Largest errors on inputs that are hard in float32, against extended precision."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import Arrays, Problem, available
from benchmarks.settings import Settings
from tests import oracle

N, C = 4096, 16
MANY = 1_000_000
COMPARED = ["y", "dx", "dscale"]


def inputs() -> dict[str, np.ndarray]:
    normal = np.random.default_rng(0).normal(size=(N, C))
    row = np.arange(N)[:, None] + np.zeros(C)
    values = {
        "N(0, 1)": normal,
        "N(1e3, 1)": normal + 1e3,
        "N(1e4, 1)": normal + 1e4,
        "N(1e6, 1)": normal + 1e6,
        "constant 3.3": np.full((N, C), 3.3),
        "one spike of 1e6": np.where(row == 7, 1e6, normal),
        "two clusters far from zero": np.sign(normal) * 1e3 + normal + 1e6,
        "ramp": row,
        "N(1e7, 1), many values": np.random.default_rng(2).normal(size=(MANY, 2)) + 1e7,
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def measure(settings: Settings) -> dict[str, Any]:
    makers, missing = available()
    # Compiled once for all inputs of a shape.
    contenders = {name: functools.cache(make) for name, make in makers.items()}
    errors: dict[str, dict[str, dict[str, float | None]]] = {}
    shapes = {}
    for name, x in settings.track(list(inputs().items()), "accuracy"):
        rng = np.random.default_rng(1)
        dy = rng.normal(size=x.shape).astype(np.float32)
        scale, bias = rng.uniform(0.5, 2, (2, x.shape[1])).astype(np.float32)
        truth = oracle.batch_norm(x, dy, scale, bias)
        statistics = np.zeros_like(scale), np.ones_like(scale)
        arrays = Arrays(*map(jnp.asarray, (x, dy, scale, bias, *statistics)))
        errors[name], shapes[name] = {}, list(x.shape)
        for contender, make in contenders.items():
            layer = make(Problem(x.shape, -1, "float32"))
            numbers = layer.numbers(layer.put(arrays))
            found = {f: oracle.error(getattr(numbers, f), getattr(truth, f)) for f in COMPARED}
            # JSON has no word for what is not a number.
            errors[name][contender] = {f: e if math.isfinite(e) else None for f, e in found.items()}
    return {"shapes": shapes, "dtype": "float32", "missing": missing, "errors": errors}
