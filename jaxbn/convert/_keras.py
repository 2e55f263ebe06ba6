"""Keras: `gamma`, `beta`, `moving_mean` and `moving_variance`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn import _checks
from jaxbn.convert import _entries
from jaxbn.convert._entries import Params, State

# In the order of `layer.get_weights()`.
_NAMES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def from_keras(weights: Mapping[str, Any], prefix: str = "") -> tuple[Params, State]:
    """Return jaxbn's params and state of a Keras `BatchNormalization`.

    `gamma` becomes `scale`, `beta` becomes `bias`, `moving_mean` and `moving_variance` become
    `mean` and `var`. The convention is `jaxbn.KERAS`; `momentum` and `epsilon` mean the same as in
    jaxbn.

    Args:
      weights: `{v.name: v.numpy() for v in layer.weights}`, or those of a model, with `v.path` as
        the key; NumPy or JAX arrays, of shape (C,) and a floating dtype.
      prefix: the layer's path in a model, "model/batch_normalization", with or without a slash at
        its end. Entries of other layers are ignored. Without it, every entry must belong to the
        layer.

    Returns:
      `params`, with `scale` (unless the layer has `scale=False`) and `bias` (unless it has
      `center=False`), and `state`, with `mean` and `var`; all of shape (C,).

    Raises:
      ValueError: entries are missing, extra, of the wrong shape or not floating; all are listed.
      TypeError: `weights` is not a mapping.

    Example:
      >>> import numpy as np
      >>> from jaxbn.convert import from_keras
      >>> ones = np.ones(16, np.float32)
      >>> weights = {"beta": ones, "moving_mean": ones, "moving_variance": ones}
      >>> params, state = from_keras(weights)
      >>> sorted(params), sorted(state)
      (['bias'], ['mean', 'var'])

    Source: `keras.layers.BatchNormalization`, Keras 3.
    """
    _checks.mapping("weights", weights)
    prefix = _entries.complete_prefix(prefix, "/")
    own = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
    missing = [prefix + k for k in ("moving_mean", "moving_variance") if k not in own]
    extra = [own[k] for k in own if k not in _NAMES]
    leaves = {k: _entries.array(weights[own[k]]) for k in _NAMES if k in own}
    problems = _entries.listed("missing", missing) + _entries.listed("extra", extra)
    problems += _entries.leaf_problems({own[k]: v for k, v in leaves.items()})
    _entries.raise_if_any("weights do not hold one batch norm", problems)
    params, state = _entries.params_and_state({_NAMES[k]: v for k, v in leaves.items()})
    assert state is not None
    return params, state


def to_keras(
    params: Mapping[str, Any], state: Mapping[str, Any], prefix: str = ""
) -> dict[str, np.ndarray]:
    """Return the weights of a Keras `BatchNormalization`, given jaxbn's params and state.

    This is the inverse of `from_keras`. Once the layer is built, load them with
    `layer.set_weights(list(to_keras(params, state).values()))`. Keras does not count batches: a
    `count` in the state is ignored.

    Args:
      params: `scale` and `bias`, either or both of which may be missing; shape (C,), or one that
        broadcasts, (1, 1, 1, C).
      state: `mean`, `var` and, optionally, `count`.
      prefix: the layer's path in a model.

    Returns:
      `gamma` if there is a `scale`, `beta` if there is a `bias`, `moving_mean` and
      `moving_variance`, in Keras's order. They have shape (C,), and share no memory with params and
      state.

    Raises:
      ValueError: entries are missing, extra, of the wrong shape or not floating (all are listed),
        or the state is None: Keras has no layer without running statistics.
      TypeError: `params` or `state` is not a mapping.

    Example:
      >>> import jaxbn
      >>> from jaxbn.convert import to_keras
      >>> params, state = jaxbn.init((64, 32, 32, 16), use_bias=False)
      >>> list(to_keras(params, state))
      ['gamma', 'moving_mean', 'moving_variance']
    """
    leaves, problems = _entries.named_leaves(params, state)
    leaves = _entries.with_one_axis(leaves)
    problems += _entries.missing_state("Keras", state) + _entries.all_problems(leaves)
    _entries.raise_if_any("Keras's batch norm cannot hold these params and state", problems)
    prefix = _entries.complete_prefix(prefix, "/")
    return {
        prefix + theirs: np.array(leaves[ours]) for theirs, ours in _NAMES.items() if ours in leaves
    }
