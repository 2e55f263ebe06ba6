"""Describe a layer of PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxbn.parity._networks import layers

if TYPE_CHECKING:
    import torch


def facts_of(module: torch.nn.Module) -> layers.Facts | None:
    """Return the kind and the shape of a layer, or None if it has no parameters of its own."""
    import torch

    if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return layers.batch_norm((module.num_features,))
    mean = getattr(module, "running_mean", None)
    if isinstance(mean, torch.Tensor) and hasattr(module, "running_var"):
        return layers.batch_norm(tuple(mean.shape))
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    shape = tuple(weight.shape)
    if "norm" in type(module).__name__.lower():
        return layers.normalization(shape)
    if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
        return layers.embedding(shape)
    if isinstance(module, torch.nn.modules.conv._ConvTransposeNd):
        return layers.transposed_convolution((*shape[2:], *shape[:2]))
    if len(shape) > 2:
        return layers.convolution((*shape[2:], shape[1], shape[0]), getattr(module, "groups", 1))
    return layers.linear(shape[1], shape[0]) if len(shape) == 2 else None
