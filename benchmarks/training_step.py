"""Seconds of a whole training step of a ResNet-18, with our layer and with Flax's."""

import statistics
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.resnet import NORMS, ResNet, training_step
from benchmarks.settings import Settings


def setup(quick: bool, on_cpu: bool) -> tuple[dict[str, Any], tuple[int, ...], list[str]]:
    """The model's keywords, the images' shape, and the types to compute in."""
    if quick:
        return {"stem": "small", "blocks": (1,), "features": 8}, (4, 16, 16, 3), ["float32"]
    if on_cpu:
        # Convolutions in bfloat16 are not what a CPU is for.
        return {"stem": "small"}, (32, 32, 32, 3), ["float32"]
    return {}, (64, 224, 224, 3), ["float32", "bfloat16"]


def measure(settings: Settings) -> dict[str, Any]:
    model, shape, dtypes = setup(settings.quick, jax.default_backend() == "cpu")
    images = jax.random.normal(jax.random.key(0), shape)
    labels = jnp.arange(shape[0])
    records = []
    for dtype in settings.track(dtypes, "training step"):
        nets = {name: ResNet(norm, dtype=dtype, **model) for name, norm in NORMS.items()}
        # Both have the same variables by the same names.
        init = jax.jit(nets["ours"].init, static_argnums=2)
        variables = init(jax.random.key(1), images, True)
        calls = {
            name: partial(jax.jit(training_step(net)), variables, images, labels)
            for name, net in nets.items()
        }
        times = timing.turn_by_turn(calls, seconds=0.5 if settings.quick else 30.0)
        records.append(
            {
                "dtype": dtype,
                "rounds": len(times["ours"]),
                "seconds": {name: statistics.median(taken) for name, taken in times.items()},
                "ours_over_flax": timing.median_ratio(times["ours"], times["Flax"]),
            }
        )
    return {"model": model, "images": list(shape), "cases": records}
