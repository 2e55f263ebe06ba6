"""The conversion of PyTorch's state dict to Flax's variables."""

import re
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxbn.convert import batch_norms_from_torch
from train_examples.port_resnet.config import WIDTH, WeightsError
from train_examples.port_resnet.torch_model import entries
from train_examples.port_resnet.weights import StateDict

CLASSES = 1000
# From PyTorch's order of axes to Flax's, by the number of axes: (output, input, height, width) to
# (height, width, input, output), and (output, input) to (input, output).
TRANSPOSED = {4: (2, 3, 1, 0), 2: (1, 0)}
# An error lists at most this many problems.
SHOWN = 10


def to_flax(state_dict: StateDict) -> dict[str, Any]:
    """Return the variables of `flax_model.ResNet18` for a state dict of `torch_model.ResNet18`."""
    check(state_dict)
    params, batch_stats = {}, {}
    for name, (norm_params, state) in batch_norms_from_torch(state_dict).items():
        params[path(name)], batch_stats[path(name)] = norm_params, state
    for name, value in state_dict.items():
        if value.ndim in TRANSPOSED:
            kernel = np.transpose(value, TRANSPOSED[value.ndim])
            params[path(name.removesuffix(".weight"))] = {"kernel": kernel}
    params[path("fc")]["bias"] = state_dict["fc.bias"]
    return {"params": unflatten_dict(params), "batch_stats": unflatten_dict(batch_stats)}


def path(name: str) -> tuple[str, ...]:
    """Return the path of a module in Flax: `("layer1_0", "conv1")` for `layer1.0.conv1`."""
    return tuple(re.sub(r"\.(\d+)", r"_\1", name).split("."))


def size(state_dict: StateDict) -> tuple[int, int]:
    """Return the width and the number of classes of the network that a state dict belongs to."""

    def rows(name: str, default: int) -> int:
        return len(state_dict[name]) if name in state_dict and state_dict[name].ndim else default

    return rows("conv1.weight", WIDTH), rows("fc.weight", CLASSES)


def check(state_dict: StateDict) -> None:
    """Raise a `WeightsError` that lists where a state dict differs from that of a ResNet-18."""
    wanted = entries(*size(state_dict))
    problems = [f"{name} is missing" for name in wanted if name not in state_dict]
    problems += [f"{name} is not of this network" for name in state_dict if name not in wanted]
    problems += [
        f"{name} has the shape {state_dict[name].shape}, not {shape}"
        for name, shape in wanted.items()
        if name in state_dict and state_dict[name].shape != shape
    ]
    problems += [
        f"{name} has the dtype {state_dict[name].dtype}"
        for name in wanted
        if name in state_dict
        and state_dict[name].dtype.kind != ("i" if name.endswith("num_batches_tracked") else "f")
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise WeightsError(
            f"these are not the weights of a ResNet-18 in torchvision's names: "
            f"{'; '.join(problems[:SHOWN])}{more}."
        )
