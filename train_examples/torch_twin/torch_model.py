"""The digits network in PyTorch, and the conversion of Flax's variables to its state dict."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from jaxbn.convert import to_torch


class ConvNet(nn.ModuleDict):
    """`train_examples.common.model.ConvNet`, for images of shape (N, channels, height, width).

    Its layers have the names that Flax gives them: `Conv_0`, `BatchNorm_0`, and so on.
    """

    def __init__(self, widths: Sequence[int], classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        features = [channels, *(width for width in widths for _ in range(2))]
        for n, (inputs, outputs) in enumerate(pairwise(features)):
            self[f"Conv_{n}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            self[f"BatchNorm_{n}"] = nn.BatchNorm2d(outputs)
        self["Dense_0"] = nn.Linear(features[-1], classes)
        self.convolutions = len(features) - 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images
        for n in range(self.convolutions):
            if n > 0 and n % 2 == 0:
                x = functional.max_pool2d(x, 2)
            x = functional.relu(self[f"BatchNorm_{n}"](self[f"Conv_{n}"](x)))
        return self["Dense_0"](x.mean((2, 3)))


def to_state_dict(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """Return PyTorch's state dict for Flax's variables.

    `Conv_0/kernel` becomes `Conv_0.weight`, with output and input features first. `jaxbn.convert`
    converts the batch norms.
    """
    entries: dict[str, Any] = {}
    for name, layer in params.items():
        if name in batch_stats:
            entries |= to_torch(layer, batch_stats[name], prefix=name)
            continue
        kernel = np.asarray(layer["kernel"])
        # (height, width, input, output), or (input, output) of the dense layer.
        order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        entries[f"{name}.weight"] = kernel.transpose(order)
        if "bias" in layer:
            entries[f"{name}.bias"] = np.asarray(layer["bias"])
    return entries
