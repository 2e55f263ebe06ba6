"""Measure the seconds of a training step of a ResNet-18, with our layer and with Flax's.

The images are crops of photographs, and the running statistics are warmed up, so the activations
are about as far from zero as those of networks at initialization are.
"""

import statistics
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.resnet import NORMS, ResNet, training_step
from benchmarks.settings import Settings

# The mean and deviation of red, green and blue in ImageNet's images, with values in [0, 1].
# Networks trained on ImageNet subtract and divide by them.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The side of a crop in pixels, as on ImageNet; smaller images are scaled down.
VIEW = 224


def setup(quick: bool, on_cpu: bool) -> tuple[dict[str, Any], tuple[int, ...], list[str]]:
    """Return the model's keywords, the shape of the images, and the dtypes to compute in."""
    if quick:
        return {"stem": "small", "blocks": (1,), "features": 8}, (4, 16, 16, 3), ["float32"]
    if on_cpu:
        # Convolutions in bfloat16 are slow on a CPU.
        return {"stem": "small"}, (32, 32, 32, 3), ["float32"]
    return {}, (64, 224, 224, 3), ["float32", "bfloat16"]


def photographs(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Return square images cropped at random from scikit-learn's two photographs, normalized."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    stride = max(1, VIEW // shape[1])
    side = stride * shape[1]
    crops = []
    for k in range(shape[0]):
        photo = photos[k % len(photos)]
        top, left = (rng.integers(0, size - side + 1) for size in photo.shape[:2])
        crops.append(photo[top : top + side : stride, left : left + side : stride])
    return jnp.asarray((np.stack(crops) / 255 - MEAN) / DEVIATION, jnp.float32)


def warmed_up(variables: Any, batches: Iterable[jax.Array], dtype: str, **model: Any) -> Any:
    """Return the variables with the running statistics of many steps, and unchanged weights.

    The momentum is small here, so that a few batches are enough.
    """
    net = ResNet(partial(NORMS["ours"], momentum=0.5), dtype=dtype, **model)
    forward = jax.jit(partial(net.apply, train=True, mutable=["batch_stats"]))
    for images in batches:
        _, updates = forward(variables, images)
        variables = {**variables, **updates}
    return variables


def off_zero(batch_stats: Any) -> list[bool]:
    """Return, for each norm, whether the mean of some feature exceeds its deviation."""
    norms = jax.tree.leaves(
        batch_stats, is_leaf=lambda leaf: isinstance(leaf, Mapping) and "mean" in leaf
    )
    return [bool(jnp.any(jnp.abs(one["mean"]) > jnp.sqrt(one["var"]))) for one in norms]


def measure(settings: Settings) -> dict[str, Any]:
    model, shape, dtypes = setup(settings.quick, jax.default_backend() == "cpu")
    images, *earlier = (photographs(shape, seed) for seed in range(9))
    labels = jnp.arange(shape[0])
    records = []
    for dtype in settings.track(dtypes, "training step"):
        nets = {name: ResNet(norm, dtype=dtype, **model) for name, norm in NORMS.items()}
        # Both models have the same variables under the same names.
        init = jax.jit(nets["ours"].init, static_argnums=2)
        variables = init(jax.random.key(1), images, True)
        variables = warmed_up(variables, earlier, dtype, **model)
        far = off_zero(variables["batch_stats"])
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
                "norms": len(far),
                "norms_off_zero": sum(far),
            }
        )
    return {"model": model, "images": list(shape), "cases": records}
