"""Largest errors on inputs that are hard in float32, against extended precision."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import Arrays, Problem, available
from benchmarks.settings import Settings
from tests import oracle

N, C = 4096, 16
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
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def measure(settings: Settings) -> dict[str, Any]:
    makers, missing = available()
    problem = Problem((N, C), -1, "float32")
    contenders = {name: make(problem) for name, make in makers.items()}
    rng = np.random.default_rng(1)
    dy = rng.normal(size=(N, C)).astype(np.float32)
    scale, bias = rng.uniform(0.5, 2, (2, C)).astype(np.float32)
    errors: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, x in settings.track(list(inputs().items()), "accuracy"):
        truth = oracle.batch_norm(x, dy, scale, bias)
        arrays = Arrays(*map(jnp.asarray, (x, dy, scale, bias)))
        errors[name] = {}
        for contender, layer in contenders.items():
            numbers = layer.numbers(layer.put(arrays))
            found = {f: oracle.error(getattr(numbers, f), getattr(truth, f)) for f in COMPARED}
            # JSON has no word for what is not a number.
            errors[name][contender] = {f: e if math.isfinite(e) else None for f, e in found.items()}
    return {"shape": [N, C], "dtype": "float32", "missing": missing, "errors": errors}
