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


# PyTorch writes the weight of the new value, 0.1; here momentum is the weight of the old one.
PYTORCH = _convention(0.9, 1e-5, "biased", "unbiased")
FLAX = _convention(0.99, 1e-5, "biased", "biased")
KERAS = _convention(0.99, 1e-3, "biased", "biased")
EXERCISE = _convention(0.9, 1e-5, "unbiased", "unbiased")
