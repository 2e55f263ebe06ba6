"""Describe a layer by its kind and the shape of its parameters, in Flax's layout."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Facts(NamedTuple):
    """What is compared to find a layer's counterpart.

    Attributes:
      kind: "batch norm", "convolution", "transposed convolution", "linear", "embedding" or
        "normalization".
      shape: that of the kernel, (*window, input, output); (C,) for norms.
      channels: how many features the input must have, or None if that is not known.
    """

    kind: str
    shape: Shape
    channels: int | None

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}"


def batch_norm(features: Shape) -> Facts:
    return Facts("batch norm", features, features[0] if len(features) == 1 else None)


def normalization(features: Shape) -> Facts:
    return Facts("normalization", features, None)


def embedding(shape: Shape) -> Facts:
    return Facts("embedding", shape, None)


def linear(inputs: int, outputs: int) -> Facts:
    return Facts("linear", (inputs, outputs), inputs)


def convolution(kernel: Shape, groups: int) -> Facts:
    return Facts("convolution", kernel, kernel[-2] * groups)


def transposed_convolution(kernel: Shape) -> Facts:
    return Facts("transposed convolution", kernel, kernel[-2])


def of_flax(layer: Any, params: Mapping[str, Shape], statistics: Mapping[str, Shape]):
    """Return the facts of a layer of Linen or NNX, which have the same attributes, or None.

    Args:
      layer: the module.
      params, statistics: the shapes of its own parameters and running statistics.
    """
    if "mean" in statistics and "var" in statistics:
        return batch_norm(statistics["mean"])
    if "embedding" in params:
        return embedding(params["embedding"])
    if "kernel" in params:
        return _with_kernel(layer, params["kernel"])
    if "scale" in params and "norm" in type(layer).__name__.lower():
        return normalization(params["scale"])
    return None


def _with_kernel(layer: Any, kernel: Shape) -> Facts | None:
    if hasattr(layer, "transpose_kernel"):
        if layer.transpose_kernel:
            kernel = (*kernel[:-2], kernel[-1], kernel[-2])
        return transposed_convolution(kernel)
    if hasattr(layer, "feature_group_count"):
        return convolution(kernel, layer.feature_group_count)
    # The general linear layers contract several axes, and have several output axes.
    axis = getattr(layer, "axis", -1)
    contracted = len(axis) if isinstance(axis, Sequence) else 1
    if len(kernel) <= contracted:
        return None
    return linear(math.prod(kernel[:contracted]), math.prod(kernel[contracted:]))


def require_channels_last(
    label: str, name: str, layer: Facts | None, x: Shape, arrived: Shape
) -> None:
    """Raise if the network's input has the channels that a layer needs on axis 1.

    Args:
      label, name: those of the network and the layer, for the message.
      layer: the facts about the layer.
      x: the shape of the network's input.
      arrived: the shape of the layer's input, in Flax's layout.
    """
    if layer is None or layer.channels is None or arrived != x or len(x) < 3:
        return
    if x[-1] != layer.channels and x[1] == layer.channels:
        order = (0, *range(2, len(x)), 1)
        raise ValueError(
            f"x has shape {x}, with channels on axis 1, but must have them last, as Flax does: "
            f"{name} in {label} takes {layer.channels} channels. Pass x.transpose{order}."
        )
