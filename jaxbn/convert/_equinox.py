"""Equinox: a layer with `weight` and `bias`, and statistics in a state of their own."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.convert import _entries
from jaxbn.convert._entries import Array, Params, State

_PARAMS = {"weight": "scale", "bias": "bias"}
_INDICES = ("batch_counter", "batch_state_index", "ema_first_time_index", "ema_state_index")


def from_equinox(layer: Any, state: Any) -> tuple[Params, State]:
    r"""Our params and state, from a `BatchNorm` of Equinox's.

    `weight` becomes `scale`, `bias` stays; `mean` and `var` are what Equinox evaluates with. Pass
    the layer's `eps` as `epsilon` and its `momentum`, and `running_variance="biased"`: Equinox
    tracks the biased variance. It keeps features on the first axis of each example.

    A layer with `mode="batch"` divides its averages by :math:`1 - m^{\mathrm{counter}}` in
    evaluation, m being its momentum; so does this. `count` is the counter. Training goes on as in
    Equinox, from the first batch on, with a momentum that follows the count,

    .. math:: \mathrm{momentum} = 1 - \frac{1 - m}{1 - m^{\,\mathrm{count} + 1}}

    A layer with `mode="ema"` normalizes with its averages in training too, which ours does not; its
    averages move as ours do. It keeps no count: before its first batch `count` is 0 here, and
    `mean` and `var` mean nothing; afterwards there is none.

    Args:
      layer: an `equinox.nn.BatchNorm`, for instance `model.norm1`, of Equinox 0.13.
      state: the `equinox.nn.State` of the layer, or of the model it is in.

    Returns:
      `params`, with `scale` and `bias`, or {} of a layer with `channelwise_affine=False`, and
      `state`, with `mean`, `var` and, see above, `count` (int32, scalar); of shape (C,).

    Raises:
      ValueError: the leaves differ in shape or are not floating; all are listed.
      TypeError: `layer` is no batch norm of Equinox's.

    Example:
      >>> import equinox as eqx
      >>> from jaxbn.convert import from_equinox
      >>> make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
      >>> layer, layer_state = make(16, axis_name="batch", mode="batch")
      >>> params, state = from_equinox(layer, layer_state)
      >>> params["scale"].shape, int(state["count"])
      ((16,), 0)

    Source: `equinox.nn.BatchNorm`.
    """
    _check_layer(layer)
    leaves: dict[str, Array] = {}
    for theirs, ours in _PARAMS.items():
        if getattr(layer, theirs) is not None:
            leaves[ours] = getattr(layer, theirs)
    if layer.batch_state_index is not None:
        counter = state.get(layer.batch_counter)
        mean, var = _debiased(layer.momentum, counter, *state.get(layer.batch_state_index))
        if int(counter) < _entries.SETTLED:
            leaves["count"] = counter
    else:
        mean, var = state.get(layer.ema_state_index)
        if state.get(layer.ema_first_time_index):
            leaves["count"] = np.zeros((), np.int32)
    leaves |= {"mean": mean, "var": var}

    labels = {"scale": "layer.weight", "bias": "layer.bias", "mean": "its mean", "var": "its var"}
    problems = _entries.leaf_problems({labels[k]: v for k, v in leaves.items() if k in labels})
    _entries.refuse("layer and state do not hold a batch norm", problems)
    ours_params, ours_state = _entries.split(leaves)
    assert ours_state is not None
    return ours_params, ours_state


def to_equinox(
    params: Mapping[str, Any], state: Mapping[str, Any], layer: Any, layer_state: Any
) -> tuple[Any, Any]:
    """A `BatchNorm` of Equinox's with the numbers of our params and state.

    The inverse of `from_equinox`. With `mode="ema"`, or without a `count`, the statistics arrive
    bit for bit, and the averages move on as ours would. With `mode="batch"` and a `count`, that is
    Equinox's counter, and the statistics are multiplied by `1 - momentum ** count`, by which it
    divides: they arrive to a rounding, and the next batches weigh as much as in Equinox.

    Args:
      params: `scale` and `bias`, or neither, as the layer has them; shape (C,), or one that
        broadcasts, (C, 1, 1).
      state: `mean`, `var` and, optionally, `count`.
      layer: the layer to fill, of the same size; its `eps`, `momentum` and `mode` stay.
      layer_state: its state, or that of the model it is in. Neither is changed, and the state can
        still be used.

    Returns:
      The layer with `weight` and `bias` replaced, and the state with this layer's replaced; in the
      dtypes that the layer has, so that what is compiled for it stays good.

    Raises:
      ValueError: entries are missing, extra, ill-sized or not floating (all are listed), or the
        state is None: Equinox has no layer without running statistics.
      TypeError: `layer` is no batch norm of Equinox's; `params` or `state` is no mapping.

    Example:
      >>> import equinox as eqx, jaxbn
      >>> from jaxbn.convert import to_equinox
      >>> make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
      >>> layer, layer_state = make(16, axis_name="batch", mode="batch")
      >>> params, state = jaxbn.init((64, 16, 32, 32), axis=1)
      >>> params["scale"] = 2 * params["scale"]
      >>> layer, layer_state = to_equinox(params, state, layer, layer_state)
      >>> float(layer.weight[0])
      2.0
    """
    _check_layer(layer)
    leaves, problems = _entries.join(params, state)
    leaves = _entries.flat(leaves)
    problems += _entries.no_statistics("Equinox", state)
    has = {ours: getattr(layer, theirs) is not None for theirs, ours in _PARAMS.items()}
    missing = [_entries.label(k) for k, there in has.items() if there and k not in leaves]
    extra = [_entries.label(k) for k, there in has.items() if not there and k in leaves]
    problems += _entries.listed("missing", missing) + _entries.listed("extra", extra)

    is_batch = layer.batch_state_index is not None
    index = layer.batch_state_index if is_batch else layer.ema_state_index
    old_mean, old_var = layer_state.get(index)
    wanted = {"the layer's mean": old_mean}
    wanted |= {_entries.label(k): v for k, v in leaves.items() if k != "count"}
    problems += _entries.leaf_problems(wanted)
    if "count" in leaves:
        problems += _entries.count_problems(_entries.label("count"), leaves["count"])
    _entries.refuse("this batch norm of Equinox's cannot hold these params and state", problems)

    count = int(leaves.get("count", _entries.SETTLED))
    mean, var = _entries.leaf(leaves["mean"]), _entries.leaf(leaves["var"])
    # A state is good for one `set`; its copy leaves the caller's as it is.
    new_state = jax.tree.map(lambda leaf: leaf, layer_state)
    if is_batch:
        # Equinox wants the very type back, weak or not, which arithmetic keeps.
        old_counter = new_state.get(layer.batch_counter)
        new_state = new_state.set(layer.batch_counter, 0 * old_counter + count)
        weight = _entries.taken_in(layer.momentum, count) if count else 1
        mean, var = mean * weight, var * weight
    else:
        new_state = new_state.set(layer.ema_first_time_index, jnp.asarray(count == 0))
    new_state = new_state.set(index, (mean.astype(old_mean.dtype), var.astype(old_var.dtype)))

    def filled(path: Any, leaf: Any) -> Any:
        ours = _PARAMS.get(path[0].name) if len(path) == 1 else None
        return leaf if ours is None else _entries.leaf(leaves[ours]).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(filled, layer), new_state


@jax.jit
def _debiased(
    momentum: float, counter: jax.Array, mean: jax.Array, var: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the layer's evaluation makes of its averages."""
    weight = jnp.where(counter == 0, 1, 1 - momentum**counter)
    return mean / weight, var / weight


def _check_layer(layer: Any) -> None:
    if not all(hasattr(layer, name) for name in (*_PARAMS, *_INDICES)):
        raise TypeError(f"layer must be an equinox.nn.BatchNorm, got {type(layer).__name__}.")
