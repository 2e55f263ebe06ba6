"""Load converted batch norms of any framework into a Flax model, Linen or NNX."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from jaxbn import _checks
from jaxbn.convert import _entries, _slot_checks
from jaxbn.convert._entries import Array
from jaxbn.convert._slots import Slots, filled, is_under, linen_slots, to_jax

if TYPE_CHECKING:
    import jax
    from flax import nnx

Layers = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]]


def put_batch_norms(
    variables: Mapping[str, Any],
    layers: Layers,
    names: Mapping[str, str] | None = None,
    *,
    kept: Collection[str] = (),
) -> dict[str, Any]:
    """Return the variables of a Linen model with the values of converted batch norms.

    Args:
      variables: what `model.init` returns, or `jax.eval_shape` of it.
      layers: a mapping from the name of each batch norm to its `params` and `state`, as returned by
        `batch_norms_from_torch` and `batch_norms_from_keras`, or collected from `from_haiku` or
        `from_equinox`. Shapes with axes of size 1, as in Haiku, become (C,).
      names: a mapping from the path of each batch norm in Flax ("block/norm") to its name in
        `layers`. Entries for other layers have no effect. By default, the names in `layers` are
        Flax's paths.
      kept: the paths of batch norms that keep the values in `variables`.

    Returns:
      A copy of `variables` with the same structure, in which all batch norms that are not kept have
      new arrays, and everything else is unchanged. A `count` in `layers` is dropped if the layer
      has none.

    Raises:
      ValueError: a batch norm of the model has no name or no values, one in `layers` has no
        counterpart in the model, or arrays are missing, extra, of the wrong shape or not floating;
        the text lists all of them.
      TypeError: an argument is not a mapping or a collection of strings.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn
      >>> from jaxbn.convert import put_batch_norms
      >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> params, state = jaxbn.init((8, 4))
      >>> layers = {"bn": (params, {**state, "mean": state["mean"] + 5})}
      >>> variables = put_batch_norms(variables, layers, {"layers_1": "bn"})
      >>> print(variables["batch_stats"]["layers_1"]["mean"])
      [5. 5. 5. 5.]
    """
    values = _values(linen_slots(variables), layers, names, kept)
    return filled(variables, values)


def load_batch_norms(
    model: nnx.Module,
    layers: Layers,
    names: Mapping[str, str] | None = None,
    *,
    kept: Collection[str] = (),
) -> None:
    """Load converted batch norms into an NNX model, in place.

    Every batch norm that is not kept gets new values. If an error is raised, the model is
    unchanged.

    Args:
      model: the model. A shared layer can be named by any of its paths.
      layers: a mapping from the name of each batch norm to its `params` and `state`; see
        `put_batch_norms`.
      names: a mapping from the path of each batch norm in NNX ("blocks/0/norm") to its name in
        `layers`; see `put_batch_norms`.
      kept: the paths of batch norms that keep their values.

    Raises:
      ValueError: a batch norm of the model has no name or no values, one in `layers` has no
        counterpart in the model, or arrays are missing, extra, of the wrong shape or not floating;
        the text lists all of them.
      TypeError: `model` is not an `nnx.Module`, or an argument is not a mapping or a collection of
        strings.

    Example:
      >>> import jaxbn
      >>> from flax import nnx
      >>> from jaxbn.convert import load_batch_norms
      >>> model = nnx.Sequential(nnx.relu, nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
      >>> params, state = jaxbn.init((8, 4))
      >>> load_batch_norms(model, {"layers/1": (params, {**state, "mean": state["mean"] + 5})})
      >>> print(model.layers[1].mean[...])
      [5. 5. 5. 5.]
    """
    from jaxbn.convert._slots_nnx import fill, first_path, nnx_slots, with_first_paths

    slots, variables = nnx_slots(model)
    _checks.mapping("layers", layers)
    names = with_first_paths(model, {n: n for n in layers} if names is None else names)
    _slot_checks.check_collection("kept", kept)
    fill(variables, _values(slots, layers, names, [first_path(model)(path) for path in kept]))


def _values(
    slots: Slots, layers: Layers, names: Mapping[str, str] | None, kept: Collection[str]
) -> dict[Hashable, jax.Array]:
    """Return an array for each slot of a batch norm that is not kept."""
    _checks.mapping("layers", layers)
    _entries.check_string_keys("layers", layers)
    given = {name: _leaves(name, pair) for name, pair in layers.items()}
    names = {name: name for name in layers} if names is None else names
    _slot_checks.check_names(names)
    _slot_checks.check_collection("kept", kept)

    with_mean, with_var = (
        {slot.layer for slot in slots.values() if slot.leaf == leaf} for leaf in _checks.STATISTICS
    )
    all_slots = slots
    slots = {k: slot for k, slot in slots.items() if slot.layer in with_mean & with_var}
    wanted = {k: slot for k, slot in slots.items() if not is_under(slot.path, kept, "/")}
    problems = _slot_checks.kept_problems(slots, kept)
    unnamed = [slot for slot in wanted.values() if slot.layer not in names]
    problems += _slot_checks.unnamed_problems(unnamed, names, all_slots)
    problems += _unplaced(given, slots, wanted, names)
    values = {}
    for key, slot in wanted.items():
        name = names.get(slot.layer)
        if name not in given:
            continue
        if slot.leaf not in given[name]:
            problems.append(f"layers[{name!r}] lacks {slot.leaf!r}, for {slot.path}")
            continue
        value = given[name][slot.leaf]
        problems += _slot_checks.value_problems(slot, f"{slot.leaf} of layers[{name!r}]", value)
        values[key] = value
    _slot_checks.raise_if_any("layers does not fit the batch norms of the model", problems)
    return to_jax(slots, values)


def _leaves(name: str, pair: Any) -> dict[str, Array]:
    """Return params and state of one batch norm as one mapping."""
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not is_pair or not all(isinstance(one, Mapping) or one is None for one in pair):
        raise TypeError(f"layers[{name!r}] must be the pair (params, state), got {pair!r}.")
    leaves = {leaf: _entries.array(v) for one in pair for leaf, v in (one or {}).items()}
    return _entries.with_one_axis(leaves)


def _unplaced(
    given: Mapping[str, Mapping[str, Array]], slots: Slots, wanted: Slots, names: Mapping[str, str]
) -> list[str]:
    """Return the problems that batch norms are not given, and that given ones have no place."""
    missing = {slot.layer: names[slot.layer] for slot in wanted.values() if slot.layer in names}
    problems = [
        f"layers lacks {name!r}, for {layer}"
        for layer, name in missing.items()
        if name not in given
    ]
    leaves: dict[str, set[str]] = {}
    for slot in slots.values():
        if slot.layer in names:
            leaves.setdefault(names[slot.layer], {"count"}).add(slot.leaf)
    for name in given:
        if name not in leaves:
            problems.append(f"no batch norm takes layers[{name!r}]")
        else:
            extra = [leaf for leaf in given[name] if leaf not in leaves[name]]
            problems += [f"no batch norm takes {leaf} of layers[{name!r}]" for leaf in extra]
    return problems
