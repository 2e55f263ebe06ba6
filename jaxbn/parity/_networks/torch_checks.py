"""Check what the layers of a PyTorch module are given: its layout and its dtype."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxbn.parity._networks.layers import Shape, require_channels_last
from jaxbn.parity._networks.torch_layers import facts_of

if TYPE_CHECKING:
    import torch


def check_inputs(
    label: str, model: torch.nn.Module, x: np.ndarray, channels_first: Collection[int]
) -> None:
    """Make the linear layers, convolutions and batch norms of a module check their inputs.

    Args:
      label: what messages call the network.
      model: the module, which gets hooks.
      x: the input of the network, in Flax's layout.
      channels_first: see `TorchNetwork`.
    """
    import torch

    def check(name, module, args):
        if args:
            _check_dtype(label, name, module, x, args[0])
            _check_layout(label, name, module, x.shape, tuple(args[0].shape), channels_first)

    conv, norm = torch.nn.modules.conv._ConvNd, torch.nn.modules.batchnorm._BatchNorm
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | conv | norm):
            module.register_forward_pre_hook(
                lambda module, args, name=name: check(name, module, args)
            )


def _check_dtype(
    label: str, name: str, module: torch.nn.Module, x: np.ndarray, given: torch.Tensor
) -> None:
    if given.is_floating_point() or given.is_complex():
        return
    wanted = "float32" if module.weight is None else dtype_name(module.weight.dtype)
    mend = f": pass x.astype('{wanted}')" if np.issubdtype(x.dtype, np.integer) else ""
    raise ValueError(f"{name} in {label} takes {wanted}, but got {dtype_name(given.dtype)}{mend}.")


def dtype_name(dtype: Any) -> str:
    """Return the name of one of PyTorch's dtypes, which is NumPy's for it."""
    return str(dtype).removeprefix("torch.")


def _check_layout(
    label: str,
    name: str,
    module: torch.nn.Module,
    x: Shape,
    given: Shape,
    channels_first: Collection[int],
) -> None:
    facts = facts_of(module)
    assert facts is not None
    moved, is_linear = len(given) in channels_first, facts.kind == "linear"
    if moved and not is_linear:
        given = (given[0], *given[2:], given[1])
    # Where channels are moved, a linear layer acts on an axis of space.
    if moved != is_linear:
        require_channels_last(label, name, facts, x, given)
    elif not moved and given == x and len(x) > 2 and x[1] != facts.channels == x[-1]:
        ranks = tuple(sorted({len(x), *channels_first}))
        raise ValueError(
            f"{name} in {label} takes {facts.channels} channels on axis 1, but got x of shape {x} "
            f"unchanged, because {len(x)} is not in channels_first: pass channels_first={ranks}."
        )
