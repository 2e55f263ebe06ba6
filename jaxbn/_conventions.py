"""The conventions that batch norms differ by, as keyword arguments of `batch_norm`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any


def _convention(
    momentum: float, epsilon: float, batch_variance: str, running_variance: str
) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "momentum": momentum,
            "epsilon": epsilon,
            "batch_variance": batch_variance,
            "running_variance": running_variance,
        }
    )


#: PyTorch's, and the default everywhere here. Its own momentum, 0.1, weighs the new value.
PYTORCH = _convention(0.9, 1e-5, "biased", "unbiased")
#: That of `flax.linen.BatchNorm` and `flax.nnx.BatchNorm`.
FLAX = _convention(0.99, 1e-5, "biased", "biased")
#: That of `keras.layers.BatchNormalization`.
KERAS = _convention(0.99, 1e-3, "biased", "biased")
#: That of the exercise which the project grew from.
EXERCISE = _convention(0.9, 1e-5, "unbiased", "unbiased")
