"""Haiku: `scale`, `offset`, and two moving averages of `hidden`, `average` and `counter`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._bias_correction import bias_correction
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
    r"""Return jaxbn's params and state of a Haiku `BatchNorm`.

    `scale` keeps its name, `offset` becomes `bias`. Of each moving average, `average` becomes
    `mean` or `var`, which Haiku uses in evaluation, and `counter` becomes `count`. The convention
    is `jaxbn.FLAX`, with the layer's `decay_rate` as `momentum` and its `eps` as `epsilon`.

    Haiku's `average` is bias-corrected: the first batches have larger weights. To continue training
    as in Haiku, let the momentum depend on the count,

    .. math:: \mathrm{momentum} = 1 - \frac{1 - d}{1 - d^{\,\mathrm{count} + 1}}

    for the decay rate d. With d itself, the weight of each new batch differs by the factor
    :math:`1 - d^{\,\mathrm{count} + 1}`, which approaches 1.

    Args:
      params: Haiku's parameters of a layer or a model, of which `params[name]` is converted. It may
        be missing, as for a layer that creates neither scale nor offset.
      state: Haiku's state, of which "{name}/~/mean_ema" and "{name}/~/var_ema" are converted. Like
        the parameters, they have a shape that broadcasts, (1, 1, 1, C), and a floating dtype.
      name: the module's name in the model, "my_network/~/batch_norm".

    Returns:
      `params`, with `scale` and `bias` if the layer has them, and `state`, with `mean`, `var` and
      `count` (int32, scalar), in Haiku's shapes.

    Raises:
      ValueError: entries are missing, extra, of the wrong shape or not floating, or the two
        counters differ; all are listed.
      TypeError: `params` or `state` is not a mapping.

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
    _checks.mapping("params", params)
    _checks.mapping("state", state)
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
    counter_problems = [
        p for k, v in counters.items() for p in _entries.count_problems(labels[k], v)
    ]
    problems += counter_problems
    if not counter_problems and len({int(v) for v in counters.values()}) > 1:
        each = " and ".join(f"{labels[k]} is {int(v)}" for k, v in counters.items())
        problems.append(f"{each}, want the same")
    _entries.raise_if_any("params and state do not hold this Haiku batch norm", problems)

    leaves = {k: v for k, v in found.items() if k in _checks.PARAMS}
    leaves |= {"mean": found["mean average"], "var": found["var average"]}
    if int(found["mean counter"]) < _entries.CONVERGED_COUNT:
        leaves["count"] = found["mean counter"]
    ours_params, ours_state = _entries.params_and_state(leaves)
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
    """Return the parameters and state of a Haiku `BatchNorm`, given jaxbn's params and state.

    This is the inverse of `from_haiku`, bit for bit in all that Haiku uses in evaluation. `hidden`,
    which it uses only in training, is `average * (1 - momentum ** counter)`, up to rounding.
    Without a `count`, the counter is 2**30, so `hidden` equals `average`, and training continues as
    it would in jaxbn with that momentum.

    Args:
      params: `scale` and `bias`, either or both of which may be missing.
      state: `mean`, `var` and, optionally, `count`.
      name: the module's name in the model.
      momentum: the layer's `decay_rate`, in [0, 1).
      shape: the shape of Haiku's leaves, such as (1, 1, 1, C), which Haiku requires of its
        parameters; by default the shape that `params` and `state` have.

    Returns:
      Parameters, with `scale` and `offset` under `name`, or {} if there are none, and state, with
      "{name}/~/mean_ema" and "{name}/~/var_ema". Merge them into those of a model with `|`.

    Raises:
      ValueError: entries are missing, extra, of the wrong shape or not floating (all are listed),
        `momentum` is out of range, or the state is None: Haiku has no layer without running
        statistics.
      TypeError: `params` or `state` is not a mapping.

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
    leaves, problems = _entries.named_leaves(params, state)
    problems += _entries.missing_state("Haiku", state)
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
        problems = _entries.all_problems(leaves, one_axis=False)
    _entries.raise_if_any("Haiku's batch norm cannot hold these params and state", problems)

    counter = jnp.array(int(leaves.get("count", _entries.CONVERGED_COUNT)), jnp.int32)
    theirs = {k: _entries.to_jax(leaves[ours]) for k, ours in _PARAMS.items() if ours in leaves}
    averages = {}
    for ours, module in _AVERAGES.items():
        average = _entries.to_jax(leaves[ours])
        correction = bias_correction(jnp.asarray(momentum, average.dtype), counter)
        values = (average * correction, average, counter)
        averages[module.format(name)] = dict(zip(_ENTRIES, values, strict=True))
    return ({name: theirs} if theirs else {}), averages


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(n for n in np.atleast_1d(shape) if n != 1)
