"""Rearrange the arrays of PyTorch's layers into the layouts of Flax's."""

import math
from collections.abc import Sequence
from typing import Any

from jaxbn.convert._slots import Slot


def arranged(slot: Slot, value: Any, sizes: Sequence[int] | None = None) -> Any:
    """Return PyTorch's array in the layout of its slot. The shape is right only if it fits.

    Args:
      slot: where the array is to go.
      value: a NumPy or JAX array.
      sizes: the (C, H, W) of the features along its last axis, if they are flattened.
    """
    if sizes is not None:
        value = _channels_last(value, sizes)
    if slot.leaf == "kernel":
        return _kernel(slot, value)
    is_scalar = slot.shape == () and math.prod(value.shape) == 1
    # A `DenseGeneral` or an attention has a bias for each of several axes of features.
    is_split = slot.leaf == "bias" and value.ndim == 1 and len(slot.shape) == 2
    if is_scalar or (is_split and math.prod(slot.shape) == len(value)):
        return value.reshape(slot.shape)
    return value


def is_ambiguous(slot: Slot, value: Any) -> bool:
    """Return whether a kernel could be in either layout of a transposed convolution."""
    if slot.leaf != "kernel" or value.ndim < 3:
        return False
    return _is_transposed_by_name(slot) and value.shape[0] == value.shape[1]


def fits_only_transposed(slot: Slot, value: Any) -> bool:
    """Return whether a kernel that does not fit would, if its layer were a `ConvTranspose`."""
    if slot.layout is not None or slot.leaf != "kernel" or value.ndim < 3:
        return False
    return value.shape[2:] + value.shape[:2] == slot.shape


def _is_transposed_by_name(slot: Slot) -> bool:
    """Return whether Linen's own name is all that shows that a layer is a `ConvTranspose`."""
    name = slot.layer.rpartition("/")[2]
    return slot.layout is None and name.startswith("ConvTranspose_")


def _kernel(slot: Slot, value: Any) -> Any:
    """Return a kernel with its input and output features last.

    PyTorch has (O, I, *window) for convolutions, (I, O, *window) for transposed ones, and (O, I)
    for linear layers.
    """
    if value.ndim < 2:
        return value
    window = tuple(range(2, value.ndim))
    plain = value.transpose(*window, 1, 0)
    if value.ndim == 2:
        return _split(plain, slot.shape)
    # `transpose_kernel=True` stores the kernel of the convolution whose gradient the layer
    # computes, as PyTorch does. Otherwise, the layer is a convolution of a dilated input, whose
    # window points the other way.
    # Whether a layer with a name of its own is transposed is not guessed from the shape: a
    # convolution's kernel with inputs and outputs exchanged, of a wrong pair, has the same one.
    if slot.layout == "transposed" or _is_transposed_by_name(slot):
        flipped = value.transpose(*window, 0, 1)[(slice(None, None, -1),) * len(window)]
        if slot.layout == "transposed" or flipped.shape == slot.shape:
            return flipped
    # A convolution with a window of one value is a linear layer.
    is_dense = len(slot.shape) == 2 and math.prod(plain.shape[:-2]) == 1
    return plain.reshape(plain.shape[-2:]) if is_dense else plain


def _split(kernel: Any, shape: tuple[int, ...]) -> Any:
    """Return a linear layer's kernel with the axes of a convolution or of a `DenseGeneral`."""
    sizes = {(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))}
    window = shape[:-2]
    fits = len(shape) == 3 or math.prod(window) == 1
    return kernel.reshape(shape) if fits and kernel.shape in sizes else kernel


def _channels_last(value: Any, sizes: Sequence[int]) -> Any:
    """Reorder the last axis from (C, *window), flattened, to (*window, C), flattened."""
    others = value.shape[:-1]
    first = len(others)
    split = value.reshape(*others, *sizes)
    order = (*range(first), *range(first + 1, split.ndim), first)
    return split.transpose(order).reshape(value.shape)
