"""Find out what kind of network was given, and wrap it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from jaxbn.parity._networks.network import Network
from jaxbn.parity._networks.options import CallOptions

# On Keras's PyTorch backend, its models are modules of PyTorch, too.
_CLASSES = (
    ("keras", "Model"),
    ("torch.nn", "Module"),
    ("flax.linen", "Module"),
    ("flax.nnx", "Module"),
    ("flax.nnx", "GraphDef"),
)
_FRAMEWORKS = {"torch": "PyTorch", "keras": "Keras", "flax": "Flax"}


def make_networks(
    candidate: Any,
    reference: Any,
    options: CallOptions,
    channels_first: Collection[int],
    need_variables: bool = True,
) -> tuple[Network, Network]:
    """Wrap two networks, which messages call by their frameworks if these differ.

    Args:
      candidate, reference: the networks.
      options: the keyword arguments of calls of Flax models.
      channels_first: see `TorchNetwork`.
      need_variables: whether a Linen module must come with its variables.
    """
    kinds = [_framework(r, m) for r, m in (("candidate", candidate), ("reference", reference))]
    labels = [_FRAMEWORKS[kind] for kind in kinds]
    if labels[0] == labels[1]:
        labels = ["the candidate", "the reference"]
    ours, theirs = (
        _network(role, label, kind, model, options, channels_first, need_variables)
        for role, label, kind, model in zip(
            ("candidate", "reference"), labels, kinds, (candidate, reference), strict=True
        )
    )
    return ours, theirs


def _framework(role: str, model: Any) -> str:
    """Return the framework of a network. One that is not imported yet cannot have made it."""
    first = model[0] if isinstance(model, tuple) and model else model
    for module, class_name in _CLASSES:
        found = getattr(sys.modules.get(module), class_name, None)
        if found is not None and isinstance(first, found):
            return module.split(".")[0]
    raise TypeError(
        f"{role} must be a Linen module with its variables, an NNX module or the parts of "
        f"nnx.split, a Keras model, or a PyTorch module; got {type(model).__name__}."
    )


def _network(
    role: str,
    label: str,
    framework: str,
    model: Any,
    options: CallOptions,
    channels_first: Collection[int],
    need_variables: bool,
) -> Network:
    if framework == "torch":
        from jaxbn.parity._networks.torch import TorchNetwork

        return TorchNetwork(label, model, channels_first)
    if framework == "keras":
        from jaxbn.parity._networks.keras import KerasNetwork

        return KerasNetwork(label, model)
    from flax import nnx

    from jaxbn.parity._networks.linen import LinenNetwork
    from jaxbn.parity._networks.nnx import NnxNetwork

    if isinstance(model, nnx.Module):
        model = nnx.split(model)
    if isinstance(model, tuple) and isinstance(model[0], nnx.GraphDef):
        graphdef, *states = model
        return NnxNetwork(label, graphdef, nnx.merge_state(*states), options)
    if isinstance(model, tuple):
        module, variables = model
        return LinenNetwork(label, module, variables, options)
    if getattr(model, "scope", None) is not None:
        module, variables = model.unbind()
        return LinenNetwork(label, module, variables, options)
    if need_variables:
        raise TypeError(
            f"{role} must be a bound Linen module, model.bind(variables), or the pair (model, "
            f"variables); got a {type(model).__name__} without variables."
        )
    return LinenNetwork(label, model, None, options)
