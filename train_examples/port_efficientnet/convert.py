"""The conversion of the PyTorch network's weights and statistics to Flax's variables."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from jaxbn.convert import variables_from_torch
from train_examples.port_efficientnet.flax_model import EfficientNetLite0


def to_flax(
    torch_model: torch.nn.Module, model: EfficientNetLite0, names: Mapping[str, str]
) -> dict[str, Any]:
    """Return the variables of the Flax network, given its layers' names in PyTorch."""
    images = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    return variables_from_torch(torch_model.state_dict(), names, shapes)
