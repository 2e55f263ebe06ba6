"""The conversion of PyTorch's state dict to Flax's variables."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbn.convert import batch_norms_from_torch
from train_examples.port_efficientnet.flax_model import EfficientNetLite0
from train_examples.port_efficientnet.names import names


def to_flax(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the variables of the Flax network."""
    norms = batch_norms_from_torch(state_dict)
    params, batch_stats = {}, {}
    for path, name in names().items():
        if name in norms:
            params[path], state = norms[name]
            assert state is not None
            # The network does not count its batches.
            batch_stats[path] = {"mean": state["mean"], "var": state["var"]}
        else:
            weight = state_dict[f"{name}.weight"].numpy()
            # (output, input, height, width) to (height, width, input, output).
            order = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
            params[path] = {"kernel": weight.transpose(order)}
            if f"{name}.bias" in state_dict:
                params[path]["bias"] = state_dict[f"{name}.bias"].numpy()
    variables = {"params": params, "batch_stats": batch_stats}
    variables = {kind: _nested(leaves) for kind, leaves in variables.items()}
    _check(variables)
    unread = {name.rpartition(".")[0] for name in state_dict} - set(names().values())
    if unread:
        raise ValueError(f"no layer of the network reads {sorted(unread)}.")
    return variables


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def _check(variables: Mapping[str, Any]) -> None:
    """Raise a ValueError for variables that are not the network's."""
    images = np.zeros((1, 32, 32, 3), np.float32)
    model = EfficientNetLite0()
    wanted: dict[Any, Any] = flatten_dict(
        jax.eval_shape(lambda: model.init(jax.random.key(0), images, False))
    )
    got: dict[Any, Any] = flatten_dict(dict(variables))
    for path in wanted.keys() | got.keys():
        shapes = [np.shape(leaves[path]) if path in leaves else None for leaves in (wanted, got)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{'/'.join(path)} must have the shape {shapes[0]}, got {shapes[1]}.")
