"""Check what is to go into the slots of a Flax model. All problems go into one error."""

from collections.abc import Collection, Iterable, Mapping

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn.convert import _entries
from jaxbn.convert._entries import Array
from jaxbn.convert._slots import Slot, Slots, is_under

# An error lists at most this many problems.
_SHOWN = 10


def check_names(names: Mapping[str, str]) -> None:
    """Check a mapping from paths to names."""
    _checks.mapping("names", names)
    _entries.check_string_keys("names", names)
    other = [value for value in names.values() if not isinstance(value, str)]
    if other:
        raise TypeError(
            f"names must have strings as values, got {', '.join(map(repr, other[:3]))}."
        )


def check_collection(argument: str, value: Collection[str]) -> None:
    """Check a collection of names or paths."""
    is_collection = isinstance(value, Collection) and not isinstance(value, str | Mapping)
    if not is_collection or not all(isinstance(one, str) for one in value):
        raise TypeError(f"{argument} must be a collection of strings, got {value!r}.")


def kept_problems(slots: Slots, kept: Collection[str]) -> list[str]:
    """Return what is wrong with the paths that keep their values."""
    paths = [slot.path for slot in slots.values()]
    problems = [
        f"kept has {one!r}, which the model does not have"
        for one in kept
        if not any(is_under(path, (one,), "/") for path in paths)
    ]
    return problems + [
        f"{slot.path} is to be kept, but has no value, only a shape"
        for slot in slots.values()
        if is_under(slot.path, kept, "/") and isinstance(slot.array, jax.ShapeDtypeStruct)
    ]


def unnamed_problems(slots: Iterable[Slot], names: Iterable[str], all_slots: Slots) -> list[str]:
    """Return the problem that slots have no name, for each layer.

    Args:
      slots: those without a name.
      names: the paths that have names. If a name is lacking, one of them may be misspelt.
      all_slots: the slots of the model.
    """
    layers: dict[str, list[str]] = {}
    for slot in slots:
        layers.setdefault(slot.layer, []).append(slot.leaf)
    problems = [f"names lacks {layer!r} ({', '.join(ls)})" for layer, ls in layers.items()]
    # What explains the others comes first, as only the first problems are shown.
    return _unknown_paths(names, all_slots) + problems if problems else []


def _unknown_paths(names: Iterable[str], slots: Slots) -> list[str]:
    paths = [slot.path for slot in slots.values()]
    unknown = [n for n in names if not any(is_under(path, (n,), "/") for path in paths) and n]
    if not unknown:
        return []
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    listed = ", ".join(map(repr, unknown[:_SHOWN])) + more
    hint = " (paths are written with '/')" if any("." in path for path in unknown) else ""
    return [f"names has paths at which the model has no variables: {listed}{hint}"]


def value_problems(slot: Slot, label: str, value: Array, given: Array | None = None) -> list[str]:
    """Return what is wrong with an array for a slot.

    Args:
      slot: the slot.
      label: what the user calls the array.
      value: the array, in Flax's layout.
      given: the array as the user has it, if it is in another layout.
    """
    given = value if given is None else given
    if slot.leaf == "count":
        return _entries.count_problems(label, value)
    if not jnp.issubdtype(given.dtype, jnp.inexact):
        return [f"{label} has dtype {given.dtype}, want a floating one"]
    if value.shape != slot.shape:
        got = f"shape {given.shape}"
        got += f", {value.shape} in Flax's layout" if value.shape != given.shape else ""
        return [f"{label} has {got}, but {slot.path} has shape {slot.shape}"]
    return []


def raise_if_any(what: str, problems: list[str]) -> None:
    """Raise a `ValueError` that lists the first problems."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    _entries.raise_if_any(what, problems[:_SHOWN] + more)
