"""The conventions of the PyTorch network's batch norms, each found by calling the layer."""

import copy
from collections import Counter

import torch

from jaxbn.parity import identify, torch_layer
from train_examples.port_efficientnet.torch_model import batch_norms

# The items of a convention.
Convention = tuple[tuple[str, object], ...]


def conventions(model: torch.nn.Module) -> Counter[Convention]:
    """Return each convention, and how many batch norms follow it."""
    # A copy, because the layers are trained to see what they do.
    norms = batch_norms(copy.deepcopy(model))
    return Counter(
        tuple(identify(torch_layer(norm), norm.num_features).items()) for norm in norms.values()
    )
