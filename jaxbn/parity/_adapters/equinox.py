"""Wrap a batch norm of Equinox."""

from typing import Any

import jax

from jaxbn._bias_correction import bias_corrected
from jaxbn.parity._adapters.jax_function import JaxFunctionLayer
from jaxbn.parity._layer import DifferentiableLayer


def equinox_layer(layer: Any, state: Any) -> DifferentiableLayer:
    """Wrap `equinox.nn.BatchNorm` as a layer for the parity tools.

    Args:
      layer, state: as returned by `equinox.nn.make_with_state` or by training.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`. Its running statistics are the ones
      that inference normalizes with. In mode "batch", these include Equinox's bias correction.

    Raises:
      ValueError: the layer has several axis names.

    Example:
      >>> import equinox as eqx, jaxbn.parity, numpy as np
      >>> norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
      >>> layer = jaxbn.parity.equinox_layer(norm, state)
      >>> layer.train(np.ones((8, 4), np.float32)).shape
      (8, 4)
    """
    import equinox as eqx

    if not isinstance(layer.axis_name, str):
        raise ValueError(f"the layer's axis_name is {layer.axis_name!r}; it must be one name.")

    def apply(params, state, x, train):
        values = tuple(params.values())
        norm = eqx.tree_at(lambda one: tuple(getattr(one, n) for n in params), layer, values)
        mapped = jax.vmap(
            lambda x, state: norm(x, state, inference=not train),
            axis_name=layer.axis_name,
            in_axes=(0, None),
            out_axes=(0, None),
        )
        return mapped(x, state)

    def statistics(state):
        if layer.mode == "ema":
            return state.get(layer.ema_state_index)
        count = state.get(layer.batch_counter)
        return bias_corrected(layer.momentum, count, *state.get(layer.batch_state_index))

    def named(params):
        return {"scale": params.get("weight"), "bias": params.get("bias")}

    params = {name: getattr(layer, name) for name in ("weight", "bias")}
    params = {name: value for name, value in params.items() if value is not None}
    return JaxFunctionLayer(
        apply, params, state.substate(layer), statistics, named, with_features=lambda _: apply
    )
