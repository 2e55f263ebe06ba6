"""Measure the bytes one layer keeps for its backward pass, and the temporaries of a step."""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.contenders import JAX_LAYERS, JaxContender, Problem
from benchmarks.resnet import NORMS, ResNet, training_step
from benchmarks.settings import Settings
from benchmarks.speed import DTYPES, arrays

LAYERS = ["ours", "Flax"]


def kept_bytes(name: str, problem: Problem) -> int:
    """Return the bytes of the distinct arrays that a compiled forward pass keeps for backward."""
    contender = JaxContender(JAX_LAYERS[name][1], problem)
    x, _, scale, bias, state = contender.put(arrays(problem))

    @jax.jit
    def forward(x, scale, bias):
        return contender.train(scale, bias, state, x)

    _, vjp, _ = jax.vjp(forward, x, scale, bias, has_aux=True)
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(vjp)}
    return sum(leaf.nbytes for leaf in leaves.values())


def step_temporaries(norm: str, dtype: str, shape: tuple[int, ...], **model: Any) -> int | None:
    """Return the bytes of temporary memory of a compiled step, or None if they are not reported."""
    net = ResNet(NORMS[norm], dtype=dtype, **model)
    images = jax.ShapeDtypeStruct(shape, dtype)
    labels = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
    variables = jax.eval_shape(
        lambda key, images: net.init(key, images, True), jax.random.key(0), images
    )
    compiled = jax.jit(training_step(net)).lower(variables, images, labels).compile()
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def measure(settings: Settings) -> dict[str, Any]:
    shape = (32, 8, 8, 64) if settings.quick else (32, 28, 28, 128)
    images = (8, 8, 8, 3) if settings.quick else (32, 32, 32, 3)
    model: dict[str, Any] = {
        "stem": "small",
        "blocks": (1,) if settings.quick else (2, 2),
        "features": 8 if settings.quick else 32,
    }
    records = []
    for dtype in settings.track(DTYPES, "memory"):
        input_bytes = jnp.zeros(shape, dtype).nbytes
        for name in LAYERS:
            kept = kept_bytes(name, Problem(shape, -1, dtype))
            records.append(
                {
                    "dtype": dtype,
                    "layer": name,
                    "kept_per_input_byte": kept / input_bytes,
                    "step_temporary_bytes": step_temporaries(name, dtype, images, **model),
                }
            )
    return {"shape": list(shape), "images": list(images), "model": model, "cases": records}
