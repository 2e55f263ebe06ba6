"""Find the entry of a PyTorch model for each slot of a Flax model, and convert it."""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import jax

from jaxbn import _checks
from jaxbn.convert import _entries, _slot_checks
from jaxbn.convert._layouts import arranged, fits_only_transposed, is_ambiguous
from jaxbn.convert._slots import Slot, Slots, is_under, to_jax

# Flax's names of arrays that PyTorch calls otherwise. All others have the same name.
_ENTRIES = {
    **dict.fromkeys(("kernel", "embedding", "scale", "negative_slope"), "weight"),
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}

Sizes = Mapping[str, Sequence[int]]


def read_model(
    state_dict: Mapping[str, Any],
    names: Mapping[str, str],
    slots: Slots,
    *,
    flattened: Sizes,
    unused: Collection[str],
    kept: Collection[str],
) -> dict[Hashable, jax.Array]:
    """Return an array for each slot that is not kept, or raise an error that lists all problems.

    The other arguments are those of `variables_from_torch`.
    """
    _checks.mapping("state_dict", state_dict)
    _entries.check_string_keys("state_dict", state_dict)
    _slot_checks.check_names(names)
    _check_sizes(flattened)
    _slot_checks.check_collection("unused", unused)
    _slot_checks.check_collection("kept", kept)

    entries = {key: _entry(slot, names) for key, slot in slots.items()}
    wanted = {k: slot for k, slot in slots.items() if not is_under(slot.path, kept, "/")}
    unnamed = [slot for key, slot in wanted.items() if entries[key] is None]
    problems = _slot_checks.unnamed_problems(unnamed, names, slots)
    problems += _slot_checks.kept_problems(slots, kept)
    problems += _unknown_layers(slots, flattened)

    with_kernel = {slot.layer for slot in slots.values() if slot.leaf == "kernel"}
    values = {}
    for key, slot in wanted.items():
        entry = entries[key]
        if entry is None:
            continue
        if entry not in state_dict:
            problems.append(f"state_dict lacks {entry!r}, for {slot.path}")
            continue
        is_output = slot.leaf == "bias" and slot.layer in with_kernel
        has_features = slot.leaf != "count" and not is_output
        sizes = flattened.get(slot.layer) if has_features else None
        values[key], its_problems = _converted(slot, entry, state_dict[entry], sizes)
        problems += its_problems
    problems += _left_over(state_dict, {e for e in entries.values() if e is not None}, unused)
    _slot_checks.raise_if_any("state_dict does not fit the model", problems)
    return to_jax(slots, values)


def _entry(slot: Slot, names: Mapping[str, str]) -> str | None:
    """Return the key of the entry for a slot, or None if its layer has no name."""
    if slot.path in names:
        return names[slot.path]
    if slot.layer not in names:
        return None
    prefix = _entries.complete_prefix(names[slot.layer], ".")
    return prefix + _ENTRIES.get(slot.leaf, slot.leaf)


def _converted(
    slot: Slot, entry: str, tensor: Any, sizes: Sequence[int] | None
) -> tuple[Any, list[str]]:
    """Return an entry in the layout of its slot, and what is wrong with it."""
    given = _entries.array(tensor)
    if sizes is not None and (not given.ndim or given.shape[-1] != math.prod(sizes)):
        features = f"{math.prod(sizes)} features, and {entry!r} has shape {given.shape}"
        return given, [f"flattened[{slot.layer!r}] is {tuple(sizes)}, which are {features}"]
    if is_ambiguous(slot, given):
        return given, [
            f"{slot.path} takes as many features as it returns, so its shape does not show its "
            f"layout: pass transpose_kernel={{{slot.layer!r}: ...}}, with the value that the layer "
            f"has"
        ]
    value = arranged(slot, given, sizes)
    problems = _slot_checks.value_problems(slot, repr(entry), value, given)
    if problems and fits_only_transposed(slot, given):
        problems[-1] += (
            f" (if {slot.layer!r} is a ConvTranspose, pass transpose_kernel={{{slot.layer!r}: "
            f"False}})"
        )
    return value, problems


def _left_over(
    state_dict: Mapping[str, Any], used: Collection[str], unused: Collection[str]
) -> list[str]:
    """Return the problems that entries have no place, and that there are none to be ignored."""
    # Only some of Flax's layers count batches, and all of PyTorch's do.
    counts = {f"{e.removesuffix('running_mean')}num_batches_tracked" for e in used}
    left = [e for e in state_dict if e not in used and e not in counts]
    problems = [f"no variable takes {e!r}" for e in left if not is_under(e, unused, ".")]
    return problems + [
        f"unused has {one!r}, which state_dict does not have"
        for one in unused
        if not any(is_under(entry, (one,), ".") for entry in state_dict)
    ]


def _unknown_layers(slots: Slots, flattened: Sizes) -> list[str]:
    layers = {slot.layer for slot in slots.values()}
    return [
        f"flattened has {layer!r}, which is not a layer of the model"
        for layer in flattened
        if layer not in layers
    ]


def _check_sizes(flattened: Sizes) -> None:
    _checks.mapping("flattened", flattened)
    for layer, sizes in flattened.items():
        is_sizes = isinstance(sizes, Sequence) and all(isinstance(n, int) for n in sizes)
        if not is_sizes or len(sizes) < 2:
            raise ValueError(
                f"flattened[{layer!r}] must be the sizes of the features before they are "
                f"flattened, such as (channels, height, width), got {sizes!r}."
            )
