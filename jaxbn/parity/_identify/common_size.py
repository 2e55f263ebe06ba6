"""Probe layers of all sizes with one compiled program."""

from typing import Any

import numpy as np

from jaxbn.parity._layer import Layer

# A program is compiled for one size, but the layers of a network have many sizes. Few layers have
# more features than this, and a batch of this many costs hardly more to compute than a small one.
_FEATURES = 2048


def with_common_size(layer: Layer, num_features: int) -> Layer:
    """Return a layer that computes with a common number of features, if the given one can."""
    repeated = getattr(layer, "repeated", None)
    number = _FEATURES
    while number < num_features:
        number *= 2
    larger = repeated(number) if repeated is not None else None
    return layer if larger is None else _Repeated(larger, num_features, number)


class _Repeated:
    """The first features of a layer, all of whose features are these again and again."""

    def __init__(self, layer: Any, num_features: int, number: int):
        self.layer, self.num_features = layer, num_features
        self.columns = np.arange(number) % num_features

    def train(self, x: np.ndarray) -> np.ndarray:
        return self.layer.train(x[:, self.columns])[:, : self.num_features]

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        return self.layer.evaluate(x[:, self.columns])[:, : self.num_features]

    def running(self) -> tuple[np.ndarray, np.ndarray]:
        mean, var = self.layer.running()
        return mean[: self.num_features], var[: self.num_features]
