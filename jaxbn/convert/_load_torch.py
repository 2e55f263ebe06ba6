"""Load a PyTorch model's whole state dict into a Flax model, Linen or NNX."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jaxbn import _checks
from jaxbn.convert._read_model import read_model
from jaxbn.convert._slot_checks import check_collection
from jaxbn.convert._slots import Slots, filled, linen_slots

if TYPE_CHECKING:
    from flax import nnx

_NOTHING = MappingProxyType({})


def variables_from_torch(
    state_dict: Mapping[str, Any],
    names: Mapping[str, str],
    variables: Mapping[str, Any],
    *,
    flattened: Mapping[str, Sequence[int]] = _NOTHING,
    transpose_kernel: Mapping[str, bool] = _NOTHING,
    unused: Collection[str] = (),
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """Return the variables of a Linen model with the values of a PyTorch model's state dict.

    Each array is rearranged from PyTorch's layout into that of its variable:

    - a convolution in 1 to 3 dimensions, grouped ones too: from (O, I, H, W) to a `kernel`
      (H, W, I, O);
    - a transposed convolution: from (I, O, H, W) to (H, W, I, O) with a reversed window, or, for
      `transpose_kernel=True`, to (H, W, O, I);
    - a linear layer: from (O, I) to (I, O), and then split into the axes of a `DenseGeneral`. If
      one side is a linear layer and the other a convolution with a window of one value, the axes of
      the window are added or removed;
    - `weight` becomes the `scale` of a norm, the `embedding` of an `Embed` or the `negative_slope`
      of a `PReLU`;
    - running statistics are converted as in `from_torch`, with a `count` only if the layer has one.

    Other arrays keep their names and shapes. Arrays in any other layout, such as packed attention
    weights, must first be converted to one of these.

    Args:
      state_dict: what `model.state_dict()` returns, or the same from a file; see `from_torch`.
      names: a mapping from the path of each layer in Flax ("block/conv") to its name in PyTorch
        ("blocks.0.conv"), as for `jaxbn.parity.compare_models`. Entries for modules without
        variables of their own have no effect. An entry may also map the path of a single array to a
        key of the state dict, such as `{"cls": "cls_token"}`.
      variables: what `model.init` returns, or `jax.eval_shape` of it, with `params` and
        `batch_stats`. It determines the layout and shape of each array.
      flattened: a mapping from the path of each layer that follows flattened images to the shape
        (C, H, W) of one image in PyTorch, before flattening. PyTorch flattens with channels first
        and Flax with channels last, so the layer's inputs are reordered. The shapes do not show
        where this is needed.
      transpose_kernel: a mapping from the paths of `ConvTranspose` layers to their option of this
        name. Pass it for each such layer with a name of its own, which is otherwise treated as a
        convolution, and for each with equal numbers of input and output features, because the
        shapes then do not show the layout.
      unused: the names of PyTorch's modules or entries that the Flax model does not have.
      kept: the paths of layers or arrays that keep the values in `variables`, such as a new head.

    Returns:
      A copy of `variables` with new arrays, which have the dtypes of the state dict and share no
      memory with it. Other collections than these two are unchanged.

    Raises:
      ValueError: a layer of Flax has no name, or an entry of the state dict is missing, has no
        counterpart in Flax, or has the wrong shape or dtype; the text lists all of them.
      TypeError: an argument is not a mapping or a collection of strings.

    Example:
      >>> import flax.linen as nn, jax, numpy as np
      >>> from jaxbn.convert import variables_from_torch
      >>> model = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu])
      >>> variables = jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 8, 8, 3)))
      >>> state_dict = {"0.weight": np.ones((16, 3, 3, 3)), "0.bias": np.zeros(16)}
      >>> variables = variables_from_torch(state_dict, {"layers_0": "0"}, variables)
      >>> variables["params"]["layers_0"]["kernel"].shape
      (3, 3, 3, 16)
    """
    slots = _with_layouts(linen_slots(variables), transpose_kernel)
    values = read_model(state_dict, names, slots, flattened=flattened, unused=unused, kept=kept)
    return filled(variables, values)


def load_torch(
    model: nnx.Module,
    state_dict: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    flattened: Mapping[str, Sequence[int]] = _NOTHING,
    unused: Collection[str] = (),
    kept: Collection[str] = (),
) -> None:
    """Load a PyTorch model's state dict into an NNX model, in place.

    Layouts are converted as in `variables_from_torch`. Every `Param` and `BatchStat` gets a value.
    If an error is raised, the model is unchanged.

    Args:
      model: the model, or an abstract one from `nnx.eval_shape`. A shared layer can be named by any
        of its paths.
      state_dict: what `model.state_dict()` returns, or the same from a file; see `from_torch`.
      names: a mapping from the path of each layer in NNX ("blocks/0/conv") to its name in PyTorch
        ("blocks.0.conv"); see `variables_from_torch`.
      flattened, unused, kept: see `variables_from_torch`.

    Raises:
      ValueError: a layer of `model` has no name, or an entry of the state dict is missing, has no
        counterpart in `model`, or has the wrong shape or dtype; the text lists all of them.
      TypeError: `model` is not an `nnx.Module`, or an argument is not a mapping or a collection of
        strings.

    Example:
      >>> import numpy as np
      >>> from flax import nnx
      >>> from jaxbn.convert import load_torch
      >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.relu)
      >>> state_dict = {"0.weight": np.ones((2, 3)), "0.bias": np.zeros(2)}
      >>> load_torch(model, state_dict, {"layers/0": "0"})
      >>> print(model(np.ones((1, 3), np.float32)))
      [[3. 3.]]
    """
    from jaxbn.convert._slots_nnx import fill, first_path, nnx_slots, with_first_paths

    slots, variables = nnx_slots(model)
    names, first = with_first_paths(model, names), first_path(model)
    _checks.mapping("flattened", flattened)
    flattened = {first(path): sizes for path, sizes in flattened.items()}
    check_collection("kept", kept)
    kept = [first(path) for path in kept]
    values = read_model(state_dict, names, slots, flattened=flattened, unused=unused, kept=kept)
    fill(variables, values)


def _with_layouts(slots: Slots, transpose_kernel: Mapping[str, bool]) -> Slots:
    """Return the slots with the layouts of the kernels of transposed convolutions."""
    _checks.mapping("transpose_kernel", transpose_kernel)
    for layer, value in transpose_kernel.items():
        _checks.python_bool(f"transpose_kernel[{layer!r}]", value)
        if not any(s.layer == layer and s.leaf == "kernel" for s in slots.values()):
            raise ValueError(f"transpose_kernel has {layer!r}, which is not a layer with a kernel.")
    layouts = {True: "plain", False: "transposed"}
    return {
        key: slot._replace(layout=layouts[bool(transpose_kernel[slot.layer])])
        if slot.layer in transpose_kernel and slot.leaf == "kernel"
        else slot
        for key, slot in slots.items()
    }
