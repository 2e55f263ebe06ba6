"""Keras: `gamma`, `beta`, `moving_mean` and `moving_variance`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn.convert import _entries
from jaxbn.convert._entries import Params, State

# In the order of Keras's `layer.get_weights()`.
_NAMES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def from_keras(weights: Mapping[str, Any], prefix: str = "") -> tuple[Params, State]:
    """Our params and state, from a `BatchNormalization` of Keras's.

    `gamma` becomes `scale`, `beta` becomes `bias`, `moving_mean` and `moving_variance` become
    `mean` and `var`. The convention is `jaxbn.KERAS`; a layer's `momentum` and `epsilon` mean what
    ours do.

    Args:
      weights: `{v.name: v.numpy() for v in layer.weights}`, or a model's, with `v.path` for the
        key; NumPy or JAX arrays, of shape (C,) and a floating dtype.
      prefix: what a model's paths have before the layer's own names, "model/batch_normalization",
        with or without a slash at its end. Other layers' entries are not looked at. Without it,
        every entry must belong to the layer.

    Returns:
      `params`, with `scale` (not of a layer with `scale=False`) and `bias` (not with
      `center=False`), and `state`, with `mean` and `var`; all of shape (C,).

    Raises:
      ValueError: entries are missing, extra, ill-sized or not floating; all are listed.
      TypeError: `weights` is no mapping.

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
    _entries.mapping("weights", weights)
    prefix = _entries.under(prefix, "/")
    own = {key.removeprefix(prefix): key for key in weights if key.startswith(prefix)}
    missing = [prefix + k for k in ("moving_mean", "moving_variance") if k not in own]
    extra = [own[k] for k in own if k not in _NAMES]
    leaves = {k: _entries.array(weights[own[k]]) for k in _NAMES if k in own}
    problems = _entries.listed("missing", missing) + _entries.listed("extra", extra)
    problems += _entries.leaf_problems({own[k]: v for k, v in leaves.items()})
    _entries.refuse("weights do not hold one batch norm", problems)
    params, state = _entries.split({_NAMES[k]: v for k, v in leaves.items()})
    assert state is not None
    return params, state


def to_keras(
    params: Mapping[str, Any], state: Mapping[str, Any], prefix: str = ""
) -> dict[str, np.ndarray]:
    """The weights of a `BatchNormalization` of Keras's, from our params and state.

    The inverse of `from_keras`. `layer.set_weights(list(to_keras(params, state).values()))` takes
    them, once the layer is built. Keras counts no batches: a `count` in the state is left out.

    Args:
      params: `scale` and `bias`, either or both of which may be missing; shape (C,), or one that
        broadcasts, (1, 1, 1, C).
      state: `mean`, `var` and, optionally, `count`.
      prefix: what a model's paths have before the layer's own names.

    Returns:
      `gamma` and `beta`, where there is a `scale` and a `bias`, `moving_mean` and
      `moving_variance`, in Keras's order; of shape (C,), sharing no memory with ours.

    Raises:
      ValueError: entries are missing, extra, ill-sized or not floating (all are listed), or the
        state is None: Keras has no layer without running statistics.
      TypeError: `params` or `state` is no mapping.

    Example:
      >>> import jaxbn
      >>> from jaxbn.convert import to_keras
      >>> params, state = jaxbn.init((64, 32, 32, 16), use_bias=False)
      >>> list(to_keras(params, state))
      ['gamma', 'moving_mean', 'moving_variance']
    """
    leaves, problems = _entries.join(params, state)
    leaves = _entries.flat(leaves)
    problems += _entries.no_statistics("Keras", state) + _entries.our_problems(leaves)
    _entries.refuse("Keras's batch norm cannot hold these params and state", problems)
    prefix = _entries.under(prefix, "/")
    return {
        prefix + theirs: np.array(leaves[ours]) for theirs, ours in _NAMES.items() if ours in leaves
    }
