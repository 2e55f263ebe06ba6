"""Haiku: `scale`, `offset`, and two moving averages of `hidden`, `average` and `counter`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.convert import _entries
from jaxbn.convert._entries import Array, Params, State

_PARAMS = {"scale": "scale", "offset": "bias"}
_AVERAGES = {"mean": "{}/~/mean_ema", "var": "{}/~/var_ema"}
_ENTRIES = ("hidden", "average", "counter")

HaikuTree = dict[str, dict[str, jax.Array]]


def from_haiku(
    params: Mapping[str, Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
    name: str = "batch_norm",
) -> tuple[Params, State]:
    r"""Our params and state, from a `BatchNorm` of Haiku's.

    `scale` stays, `offset` becomes `bias`. Of each moving average, `average` becomes `mean` or
    `var`, which is what Haiku evaluates with, and `counter` becomes `count`. The convention is
    `jaxbn.FLAX`, with the layer's `decay_rate` as `momentum` and its `eps` as `epsilon`.

    Haiku's `average` is free of its initial zeros: the first batches weigh more in it. Training
    goes on as in Haiku with a momentum that follows the count,

    .. math:: \mathrm{momentum} = 1 - \frac{1 - d}{1 - d^{\,\mathrm{count} + 1}}

    for the decay rate d. With d itself, the results differ by the factor
    :math:`1 - d^{\,\mathrm{count} + 1}` in each new batch's weight, which soon is 1.

    Args:
      params: Haiku's parameters, of a layer or a model, of which `params[name]` are taken; that
        entry is not there for a layer that creates neither scale nor offset.
      state: Haiku's state, of which "{name}/~/mean_ema" and "{name}/~/var_ema" are taken. They and
        the parameters have the shape that broadcasts, (1, 1, 1, C), and a floating dtype.
      name: the module's name in the model, "my_network/~/batch_norm".

    Returns:
      `params`, with `scale` and `bias` where the layer has them, and `state`, with `mean`, `var`
      and `count` (int32, scalar), in the shape that Haiku keeps.

    Raises:
      ValueError: entries are missing, extra, ill-sized or not floating, or the two counters differ;
        all are listed.
      TypeError: an argument is no mapping.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxbn.convert import from_haiku
      >>> ones = jnp.ones((1, 1, 1, 16))
      >>> ema = {"hidden": 0.1 * ones, "average": ones, "counter": jnp.int32(1)}
      >>> averages = {"batch_norm/~/mean_ema": ema, "batch_norm/~/var_ema": ema}
      >>> params, state = from_haiku({"batch_norm": {"scale": ones}}, averages)
      >>> sorted(params), state["mean"].shape, int(state["count"])
      (['scale'], (1, 1, 1, 16), 1)

    Source: `haiku.BatchNorm` and `haiku.ExponentialMovingAverage`.
    """
    _entries.mapping("params", params)
    _entries.mapping("state", state)
    own = params.get(name, {})
    missing, extra = [], [f"params[{name!r}][{k!r}]" for k in own if k not in _PARAMS]
    found: dict[str, Array] = {}
    labels = {ours: f"params[{name!r}][{k!r}]" for k, ours in _PARAMS.items()}
    for theirs, ours in _PARAMS.items():
        if theirs in own:
            found[ours] = _entries.array(own[theirs])
    for ours, module in _AVERAGES.items():
        module = module.format(name)
        if module not in state:
            missing.append(f"state[{module!r}]")
            continue
        extra += [f"state[{module!r}][{k!r}]" for k in state[module] if k not in _ENTRIES]
        for entry in _ENTRIES:
            key = f"{ours} {entry}"
            labels[key] = f"state[{module!r}][{entry!r}]"
            if entry in state[module]:
                found[key] = _entries.array(state[module][entry])
            else:
                missing.append(labels[key])

    problems = _entries.listed("missing", missing) + _entries.listed("extra", extra)
    counters = {k: v for k, v in found.items() if k.endswith("counter")}
    problems += _entries.leaf_problems(
        {labels[k]: v for k, v in found.items() if k not in counters}, one_axis=False
    )
    ill_counted = [p for k, v in counters.items() for p in _entries.count_problems(labels[k], v)]
    problems += ill_counted
    if not ill_counted and len({int(v) for v in counters.values()}) > 1:
        each = " and ".join(f"{labels[k]} is {int(v)}" for k, v in counters.items())
        problems.append(f"{each}, want the same")
    _entries.refuse("params and state do not hold this batch norm of Haiku's", problems)

    leaves = {k: v for k, v in found.items() if k in _entries.PARAMS}
    leaves |= {"mean": found["mean average"], "var": found["var average"]}
    if int(found["mean counter"]) < _entries.SETTLED:
        leaves["count"] = found["mean counter"]
    ours_params, ours_state = _entries.split(leaves)
    assert ours_state is not None
    return ours_params, ours_state


def to_haiku(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    name: str = "batch_norm",
    *,
    momentum: float = 0.9,
    shape: Sequence[int] | None = None,
) -> tuple[HaikuTree, HaikuTree]:
    """The parameters and state of a `BatchNorm` of Haiku's, from our params and state.

    The inverse of `from_haiku`: bit for bit in all that Haiku evaluates with. `hidden`, which only
    its training reads, is `average * (1 - momentum ** counter)`, to a rounding. Without a `count`
    the counter is so large, 2**30, that `hidden` is `average`, and training goes on as ours would
    with that momentum.

    Args:
      params: `scale` and `bias`, either or both of which may be missing.
      state: `mean`, `var` and, optionally, `count`.
      name: the module's name in the model.
      momentum: the layer's `decay_rate`, in [0, 1).
      shape: the shape of Haiku's leaves, (1, 1, 1, C), which it wants from its parameters; by
        default the shape that ours have.

    Returns:
      Parameters, with `scale` and `offset` under `name`, or {} where there are none, and state,
      with "{name}/~/mean_ema" and "{name}/~/var_ema". They merge into a model's with `|`.

    Raises:
      ValueError: entries are missing, extra, ill-sized or not floating (all are listed), `momentum`
        is out of its range, or the state is None: Haiku has no layer without running statistics.
      TypeError: `params` or `state` is no mapping.

    Example:
      >>> import jaxbn
      >>> from jaxbn.convert import to_haiku
      >>> params, state = jaxbn.init((64, 32, 32, 16))
      >>> theirs, averages = to_haiku(params, state, momentum=0.99, shape=(1, 1, 1, 16))
      >>> theirs["batch_norm"]["offset"].shape, list(averages)
      ((1, 1, 1, 16), ['batch_norm/~/mean_ema', 'batch_norm/~/var_ema'])
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}.")
    leaves, problems = _entries.join(params, state)
    problems += _entries.no_statistics("Haiku", state)
    if shape is not None:
        shape = tuple(shape)
        for key, value in leaves.items():
            if key == "count":
                continue
            if _without_ones(value.shape) == _without_ones(shape):
                leaves[key] = value.reshape(shape)
            else:
                label = _entries.label(key)
                problems.append(f"{label} has shape {value.shape}, which does not fit {shape}")
    if not problems:
        problems = _entries.our_problems(leaves, one_axis=False)
    _entries.refuse("Haiku's batch norm cannot hold these params and state", problems)

    counter = jnp.array(int(leaves.get("count", _entries.SETTLED)), jnp.int32)
    theirs = {k: _entries.leaf(leaves[ours]) for k, ours in _PARAMS.items() if ours in leaves}
    averages = {}
    for ours, module in _AVERAGES.items():
        average = _entries.leaf(leaves[ours])
        weight = _entries.taken_in(jnp.asarray(momentum, average.dtype), counter)
        values = (average * weight, average, counter)
        averages[module.format(name)] = dict(zip(_ENTRIES, values, strict=True))
    return ({name: theirs} if theirs else {}), averages


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in np.atleast_1d(shape) if n != 1)
