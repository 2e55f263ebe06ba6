"""PyTorch's state dict as Flax's variables."""

import re
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from jaxbn.convert import batch_norms_from_torch
from train_examples.port_resnet.config import WIDTH, WeightsError
from train_examples.port_resnet.torch_model import entries
from train_examples.port_resnet.weights import StateDict

CLASSES = 1000
# Between PyTorch's order of axes and Flax's: output, input, height, width; and height, width,
# input, output. A dense layer has the first two.
TRANSPOSED = {4: (2, 3, 1, 0), 2: (1, 0)}
# Problems that an error lists.
SHOWN = 10


def to_flax(state_dict: StateDict) -> dict[str, Any]:
    """The variables of `flax_model.ResNet18` for a state dict of `torch_model.ResNet18`."""
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
    """Where the module lies in Flax: `layer1.0.conv1` at `("layer1_0", "conv1")`."""
    return tuple(re.sub(r"\.(\d+)", r"_\1", name).split("."))


def size(state_dict: StateDict) -> tuple[int, int]:
    """The width and the number of classes of the network that a state dict is of."""

    def rows(name: str, default: int) -> int:
        return len(state_dict[name]) if name in state_dict and state_dict[name].ndim else default

    return rows("conv1.weight", WIDTH), rows("fc.weight", CLASSES)


def check(state_dict: StateDict) -> None:
    """Refuses what is no state dict of a ResNet-18, and says where it differs from one."""
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
