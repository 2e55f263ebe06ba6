"""The noise of a batch's mean, compared with the law that it is proportional to 1 / N."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train_examples.questions import common

SIZES = (4, 8, 16, 32, 64, 128, 256)
DRAWS = 400


class Noise(NamedTuple):
    """The variance of a batch's mean over that of one image's mean, for a first layer's outputs.

    Attributes:
      sizes: the batch sizes.
      measured: the measured ratio, (sizes, seeds).
      law: the expected ratio for batches drawn without replacement, (sizes,).
    """

    sizes: np.ndarray
    measured: np.ndarray
    law: np.ndarray


def noise(sizes: np.ndarray, seeds: int) -> Noise:
    """Measure the noise of batches of every size."""
    total = len(common.digits().train_images)
    law = (total - sizes) / (total - 1) / sizes
    return Noise(sizes, np.array([_measured(sizes, seed) for seed in range(seeds)]).T, law)


def _measured(sizes: np.ndarray, seed: int) -> list[float]:
    """Return the ratio of variances for each size, with the random kernels of one seed.

    Pixels of one image are not independent, so each image enters as the mean of its pixels.
    """
    rng = np.random.default_rng(seed)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, 8)), jnp.float32)
    features = jax.lax.conv_general_dilated(
        jnp.asarray(common.digits().train_images),
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    each = np.asarray(features, float).mean((1, 2))
    variances = []
    for size in sizes:
        drawn = [rng.choice(len(each), size, replace=False) for _ in range(DRAWS)]
        means = each[np.array(drawn)].mean(1)
        variances.append(float(np.mean(np.mean((means - each.mean(0)) ** 2, 0) / each.var(0))))
    return variances


def exponent(found: Noise) -> float:
    """Return the p of "proportional to N to the p", corrected for drawing without replacement."""
    correction = found.law * found.sizes
    logs = np.log(found.measured.mean(1) / correction)
    return float(np.polyfit(np.log(found.sizes), logs, 1)[0])
