"""Measure the largest errors on inputs that are hard in float32, against extended precision."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import Arrays, Problem, available
from benchmarks.settings import Settings
from jaxbn.parity import _oracle
from jaxbn.parity._hard_inputs import representative

MANY = 1_000_000
COMPARED = ["y", "dx", "dscale"]


def inputs() -> dict[str, np.ndarray]:
    many = np.random.default_rng(2).normal(size=(MANY, 2)) + 1e7
    values = {**representative(), "N(1e7, 1), many values": many}
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
        truth = _oracle.batch_norm(x, dy, scale, bias)
        statistics = np.zeros_like(scale), np.ones_like(scale)
        arrays = Arrays(*map(jnp.asarray, (x, dy, scale, bias, *statistics)))
        errors[name], shapes[name] = {}, list(x.shape)
        for contender, make in contenders.items():
            layer = make(Problem(x.shape, -1, "float32"))
            numbers = layer.numbers(layer.put(arrays))
            found = {f: _oracle.error(getattr(numbers, f), getattr(truth, f)) for f in COMPARED}
            # JSON has neither NaN nor infinity.
            errors[name][contender] = {f: e if math.isfinite(e) else None for f, e in found.items()}
    return {"shapes": shapes, "dtype": "float32", "missing": missing, "errors": errors}
