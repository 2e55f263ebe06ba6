"""ResNet-18 in PyTorch (He et al., "Deep Residual Learning for Image Recognition", 2015).

Its parameters have torchvision's names, so that torchvision's weights fit.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut, which is a projection if the shape changes."""

    def __init__(self, inputs: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, features, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.downsample = None
        if inputs != features:
            projection = nn.Conv2d(inputs, features, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(y + shortcut)


class ResNet18(nn.Module):
    """A network that returns the logits of images, (N, 3, height, width)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(Block(4 * width, 8 * width, 2), Block(8 * width, 8 * width, 1))
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(images)))
        x = functional.max_pool2d(x, 3, 2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def entries(width: int, classes: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the entries of the network's state dict."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in ResNet18(width, classes).state_dict().items()}


def load(state_dict: Mapping[str, np.ndarray]) -> ResNet18:
    """Return the network with these weights, in their dtype."""
    classes, _ = state_dict["fc.weight"].shape
    model = ResNet18(len(state_dict["conv1.weight"]), classes)
    tensors = {name: torch.tensor(value) for name, value in state_dict.items()}
    model.to(tensors["fc.weight"].dtype).load_state_dict(tensors)
    return model
