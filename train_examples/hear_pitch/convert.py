"""The conversion of PyTorch's weights into the NNX network."""

from collections.abc import Mapping

import torch

from jaxbn.convert import from_torch
from train_examples.hear_pitch.flax_model import Crepe


def load(model: Crepe, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Replace the weights and statistics of the NNX network."""
    weights = {name: tensor.numpy() for name, tensor in state_dict.items()}
    for k, layer in enumerate(model.layers, 1):
        layer.conv.kernel[...] = weights[f"conv{k}.weight"].transpose(2, 3, 1, 0)
        layer.conv.bias[...] = weights[f"conv{k}.bias"]
        params, state = from_torch(state_dict, f"conv{k}_BN")
        assert state is not None
        layer.norm.scale[...], layer.norm.bias[...] = params["scale"], params["bias"]
        layer.norm.mean[...], layer.norm.var[...] = state["mean"], state["var"]
    model.classifier.kernel[...] = weights["classifier.weight"].T
    assert model.classifier.bias is not None
    model.classifier.bias[...] = weights["classifier.bias"]
