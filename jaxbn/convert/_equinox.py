"""Equinox: a layer with `weight` and `bias`, and its statistics in a separate state."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._bias_correction import bias_corrected, bias_correction
from jaxbn.convert import _entries
from jaxbn.convert._entries import Array, Params, State

_PARAMS = {"weight": "scale", "bias": "bias"}
_INDICES = ("batch_counter", "batch_state_index", "ema_first_time_index", "ema_state_index")


def from_equinox(layer: Any, state: Any) -> tuple[Params, State]:
    r"""Return jaxbn's params and state of an Equinox `BatchNorm`.

    `weight` becomes `scale`, `bias` keeps its name, and `mean` and `var` are those that Equinox
    uses in evaluation. Pass the layer's `eps` as `epsilon` and its `momentum`, and
    `running_variance="biased"`: Equinox tracks the biased variance. It expects features on the
    first axis of each example.

    A layer with `mode="batch"` corrects the bias of its averages in evaluation: it divides them by
    :math:`1 - m^{\mathrm{counter}}`, where m is its momentum. The state that is returned has the
    corrected averages, and `count` is the counter. To continue training as in Equinox, let the
    momentum depend on the count,

    .. math:: \mathrm{momentum} = 1 - \frac{1 - m}{1 - m^{\,\mathrm{count} + 1}}

    A layer with `mode="ema"` normalizes with its averages in training too, unlike jaxbn, but
    updates them in the same way. It does not count batches. Before its first batch, `count` is 0
    here, and `mean` and `var` have no meaning; afterwards there is no `count`.

    Args:
      layer: an `equinox.nn.BatchNorm`, for instance `model.norm1`, of Equinox 0.13.
      state: the `equinox.nn.State` of the layer, or of the model that contains it.

    Returns:
      `params`, with `scale` and `bias`, or {} for a layer with `channelwise_affine=False`; and
      `state`, with `mean`, `var` and, as above, `count` (int32, scalar). The others have shape
      (C,).

    Raises:
      ValueError: the leaves differ in shape or are not floating; all are listed.
      TypeError: `layer` is not an Equinox batch norm.

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
        mean, var = bias_corrected(layer.momentum, counter, *state.get(layer.batch_state_index))
        if int(counter) < _entries.CONVERGED_COUNT:
            leaves["count"] = counter
    else:
        mean, var = state.get(layer.ema_state_index)
        if state.get(layer.ema_first_time_index):
            leaves["count"] = np.zeros((), np.int32)
    leaves |= {"mean": mean, "var": var}

    labels = {"scale": "layer.weight", "bias": "layer.bias", "mean": "its mean", "var": "its var"}
    problems = _entries.leaf_problems({labels[k]: v for k, v in leaves.items() if k in labels})
    _entries.raise_if_any("layer and state do not hold a batch norm", problems)
    ours_params, ours_state = _entries.params_and_state(leaves)
    assert ours_state is not None
    return ours_params, ours_state


def to_equinox(
    params: Mapping[str, Any], state: Mapping[str, Any], layer: Any, layer_state: Any
) -> tuple[Any, Any]:
    """Return an Equinox `BatchNorm` and its state with the values of jaxbn's params and state.

    This is the inverse of `from_equinox`. With `mode="ema"`, or without a `count`, the statistics
    are converted bit for bit, and training updates the averages as jaxbn would. With `mode="batch"`
    and a `count`, the count becomes Equinox's counter, and the statistics are multiplied by
    `1 - momentum ** count`, by which Equinox divides. They are then equal up to rounding, and the
    next batches have the same weights as in Equinox.

    Args:
      params: `scale` and `bias`, or neither, as the layer has them; shape (C,), or one that
        broadcasts, (C, 1, 1).
      state: `mean`, `var` and, optionally, `count`.
      layer: a layer of the same size, whose `eps`, `momentum` and `mode` are kept. It is not
        changed.
      layer_state: its state, or that of the model that contains it. It is not changed, and can
        still be used.

    Returns:
      The layer with `weight` and `bias` replaced, and the state with the layer's statistics
      replaced. They keep the layer's dtypes, so that nothing has to be compiled again.

    Raises:
      ValueError: entries are missing, extra, of the wrong shape or not floating (all are listed),
        or the state is None: Equinox has no layer without running statistics.
      TypeError: `layer` is not an Equinox batch norm; `params` or `state` is not a mapping.

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
    leaves, problems = _entries.named_leaves(params, state)
    leaves = _entries.with_one_axis(leaves)
    problems += _entries.missing_state("Equinox", state)
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
    _entries.raise_if_any("this Equinox batch norm cannot hold these params and state", problems)

    count = int(leaves.get("count", _entries.CONVERGED_COUNT))
    mean, var = _entries.to_jax(leaves["mean"]), _entries.to_jax(leaves["var"])
    # `set` invalidates a state, so it is called on a copy.
    new_state = jax.tree.map(lambda leaf: leaf, layer_state)
    if is_batch:
        # Equinox requires the same type, weak or not, which arithmetic preserves.
        old_counter = new_state.get(layer.batch_counter)
        new_state = new_state.set(layer.batch_counter, 0 * old_counter + count)
        correction = bias_correction(layer.momentum, count) if count else 1
        mean, var = mean * correction, var * correction
    else:
        new_state = new_state.set(layer.ema_first_time_index, jnp.asarray(count == 0))
    new_state = new_state.set(index, (mean.astype(old_mean.dtype), var.astype(old_var.dtype)))

    def filled(path: Any, leaf: Any) -> Any:
        ours = _PARAMS.get(path[0].name) if len(path) == 1 else None
        return leaf if ours is None else _entries.to_jax(leaves[ours]).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(filled, layer), new_state


def _check_layer(layer: Any) -> None:
    if not all(hasattr(layer, name) for name in (*_PARAMS, *_INDICES)):
        raise TypeError(f"layer must be an equinox.nn.BatchNorm, got {type(layer).__name__}.")
