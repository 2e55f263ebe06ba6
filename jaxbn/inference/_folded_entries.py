"""Fold the entries of a layer and a batch norm, which may be in boxes of Flax."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._trees import is_box
from jaxbn.inference._fold import fold
from jaxbn.inference._pairs import Pair

Entries = Mapping[str, Any]


def folded_entries(pair: Pair, layer: Entries, params: Entries, state: Entries) -> dict[str, Any]:
    """Return the folded kernel and bias of a layer, in the boxes that they were in."""
    plain, params, state = map(_unboxed, (layer, params, state))
    bias = plain.get("bias")
    if bias is None:
        bias = _zero_bias(pair.kind, plain["kernel"])
    folded = fold(plain["kernel"], bias, params, state, epsilon=pair.epsilon, axis=pair.axis)
    return {
        key: layer[key].replace_boxed(leaf) if is_box(layer.get(key)) else leaf
        for key, leaf in zip(("kernel", "bias"), folded, strict=True)
    }


def magnitudes(pair: Pair, layer: Entries, params: Entries, state: Entries) -> dict[str, Any]:
    """Return entries with which a layer sums the absolute values of the folded layer's terms.

    The bias is the sum of the absolute values of the terms of the folded bias.
    """
    plain, params, state = (
        {key: jnp.abs(leaf) for key, leaf in _unboxed(entries).items() if leaf is not None}
        for entries in (layer, params, state)
    )
    return folded_entries(pair, plain, params, state | {"mean": -state["mean"]})


def _unboxed(entries: Entries) -> dict[str, Any]:
    return {key: leaf.unbox() if is_box(leaf) else leaf for key, leaf in entries.items()}


def _zero_bias(kind: str, kernel: Any) -> np.ndarray | None:
    """Return zeros of the shape of a layer's bias, or None if that is (C,), `fold`'s default."""
    shape = np.shape(kernel)
    if kind not in ("ConvLocal", "DenseGeneral", "Einsum", "LinearGeneral") or len(shape) <= 2:
        return None
    if kind == "ConvLocal":
        return np.zeros((*shape[:-2], shape[-1]), getattr(kernel, "dtype", None))
    raise ValueError(
        f"the layer has no bias, and its kernel of shape {shape} does not determine the shape of "
        f"one. Put a bias of zeros into its params, of the shape that the layer has with "
        f"use_bias=True, and fold that."
    )
