"""The error of a moving mean: the rest of its initial value, and the noise of the last batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jaxbn
from train_examples.questions import common

# The number of batches, and how often the experiment is repeated.
COUNT = 100
REPEATS = 100


class Errors(NamedTuple):
    """Root mean squares over pixels, in units of the standard deviation of a batch's mean.

    Attributes:
      bias, noise: the measured errors.
      bias_law, noise_law: the errors that the formulas predict.
    """

    bias: float
    noise: float
    bias_law: float
    noise_law: float


def errors(momentum: float) -> Errors:
    """Return the errors of the pixels' moving means after `COUNT` batches.

    Batches are drawn with replacement, so that they are independent, as the formulas assume.
    """
    pixels = jnp.asarray(common.digits().train_images.reshape(-1, 64))
    pixels = pixels[:, jnp.var(pixels, 0) > 1e-2]
    params, state = jaxbn.init(pixels.shape)

    def step(state: dict[str, jax.Array], key: jax.Array) -> tuple[dict[str, jax.Array], None]:
        batch = pixels[jax.random.randint(key, (common.BATCH_SIZE,), 0, len(pixels))]
        _, state = jaxbn.batch_norm(params, state, batch, True, momentum=momentum)
        return state, None

    keys = jax.random.split(jax.random.key(0), (REPEATS, COUNT))
    means = jax.jit(jax.vmap(lambda keys: lax.scan(step, state, keys)[0]["mean"]))(keys)
    mean, unit = jnp.mean(pixels, 0), jnp.std(pixels, 0) / common.BATCH_SIZE**0.5

    left = momentum**COUNT
    noise_law = ((1 - momentum) / (1 + momentum) * (1 - left**2)) ** 0.5
    bias = _rms((jnp.mean(means, 0) - mean) / unit)
    noise = _rms(jnp.std(means, 0, ddof=1) / unit)
    return Errors(bias, noise, left * _rms(mean / unit), noise_law)


def _rms(values: jax.Array) -> float:
    return float(jnp.sqrt(jnp.mean(values**2)))
