"""Layers of the frameworks as the black boxes that the parity tools take.

Each works on a copy, takes (N, C) whatever layout the layer wants, and imports its framework only
when called.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._batch_norm import Params, State, batch_norm
from jaxbn.parity._layer import DifferentiableLayer
from jaxbn.parity._wrapped import JaxLayer, TorchLayer, with_layout


def from_batch_norm(params: Params, state: State, **options: Any) -> DifferentiableLayer:
    """`jaxbn.batch_norm` as a layer for the parity tools.

    Args:
      params: `scale` and `bias`, of shape (C,), either or both of which may be missing.
      state: `mean`, `var` and, for `momentum=None`, `count`.
      **options: keyword arguments of `batch_norm`, such as a convention.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Example:
      >>> import jaxbn, jaxbn.parity, numpy as np
      >>> layer = jaxbn.parity.from_batch_norm(*jaxbn.init((8, 2)), **jaxbn.FLAX)
      >>> y, gradients = layer.step(np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32))
      >>> sorted(gradients)
      ['bias', 'scale', 'x']
    """

    def apply(params, state, x, train):
        return batch_norm(params, state, x, train, **options)

    return JaxLayer(
        with_layout(apply, options.get("axis", -1)),
        dict(params),
        dict(state),
        lambda state: (state["mean"], state["var"]),
    )


def from_linen(module: Any, variables: Mapping[str, Any]) -> DifferentiableLayer:
    """`flax.linen.BatchNorm`, or `jaxbn.linen.BatchNorm`, as a layer for the parity tools.

    Args:
      module: the module. Its axis name and groups are left out: the probes run on one device.
      variables: what its `init` returned, or training made of it: `params` and `batch_stats`.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Example:
      >>> import flax.linen, jax, jax.numpy as jnp, jaxbn.parity
      >>> module = flax.linen.BatchNorm(use_running_average=False, momentum=0.9)
      >>> variables = module.init(jax.random.key(0), jnp.ones((8, 4)))
      >>> jaxbn.parity.identify(jaxbn.parity.from_linen(module, variables), 4)["momentum"]
      0.9
    """
    unmapped = {k: None for k in ("axis_name", "axis_index_groups") if hasattr(module, k)}
    module = module.clone(use_running_average=None, **unmapped)

    def apply(params, state, x, train):
        y, updates = module.apply(
            {"params": params, "batch_stats": state},
            x,
            use_running_average=not train,
            mutable=["batch_stats"],
        )
        return y, updates["batch_stats"]

    return JaxLayer(
        with_layout(apply, module.axis),
        variables.get("params", {}),
        variables["batch_stats"],
        lambda state: (state["mean"], state["var"]),
    )


def from_nnx(layer: Any) -> DifferentiableLayer:
    """`flax.nnx.BatchNorm`, or `jaxbn.nnx.BatchNorm`, as a layer for the parity tools.

    Args:
      layer: the layer, which is not changed. Its axis name and groups are left out: the probes run
        on one device.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Example:
      >>> import jaxbn.parity
      >>> from flax import nnx
      >>> layer = nnx.BatchNorm(4, epsilon=1e-3, rngs=nnx.Rngs(0))
      >>> jaxbn.parity.identify(jaxbn.parity.from_nnx(layer), 4)["epsilon"]
      0.001
    """
    from flax import nnx

    layer = nnx.clone(layer)
    layer.axis_name = layer.axis_index_groups = None
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def apply(params, state, x, train):
        merged = nnx.merge(graph, params, state, copy=True)
        y = merged(x, use_running_average=not train)
        return y, nnx.split(merged, nnx.Param, ...)[2]

    def statistics(state):
        return state["mean"][...], state["var"][...]

    def named(params):
        return {name: params[name][...] for name in ("scale", "bias") if name in params}

    return JaxLayer(with_layout(apply, layer.axis), params, state, statistics, named)


def from_haiku(transformed: Any, params: Any, state: Any) -> DifferentiableLayer:
    """A Haiku batch norm as a layer for the parity tools.

    Args:
      transformed: `haiku.transform_with_state` of a function of `x` and `is_training` that applies
        one `haiku.BatchNorm`.
      params, state: what its `init` returned, or training made of it.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Raises:
      ValueError: the state holds no batch norm, or several.

    Example:
      >>> import haiku as hk, jax.numpy as jnp, jaxbn.parity
      >>> norm = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.9)(x, train))
      >>> layer = jaxbn.parity.from_haiku(norm, *norm.init(None, jnp.ones((8, 4)), True))
      >>> try:
      ...     jaxbn.parity.identify(layer, 4)
      ... except jaxbn.parity.ConventionError as error:
      ...     print(error.found["momentum"], error.found["averages"])
      0.9 bias-corrected
    """
    averages = [name for name in state if name.endswith("/mean_ema")]
    if len(averages) != 1:
        raise ValueError(
            f"the state holds {len(averages)} batch norms, {sorted(state)}; only one can be probed."
        )
    (mean,) = averages
    var = mean.removesuffix("mean_ema") + "var_ema"

    def apply(params, state, x, train):
        return transformed.apply(params, state, None, x, train)

    def statistics(state):
        return state[mean]["average"], state[var]["average"]

    def named(params):
        leaves = {k: v for module in params.values() for k, v in module.items()}
        return {"scale": leaves.get("scale"), "bias": leaves.get("offset")}

    return JaxLayer(apply, params, state, statistics, named)


def from_equinox(layer: Any, state: Any) -> DifferentiableLayer:
    """`equinox.nn.BatchNorm` as a layer for the parity tools.

    Args:
      layer, state: what `equinox.nn.make_with_state` returned, or training made of it.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`. Its running statistics are the ones
      that inference normalizes with, so in mode "batch" those after Equinox's correction.

    Raises:
      ValueError: the layer has several axis names.

    Example:
      >>> import equinox as eqx, jaxbn.parity, numpy as np
      >>> norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", mode="batch")
      >>> layer = jaxbn.parity.from_equinox(norm, state)
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
        part = jnp.where(count == 0, 1, 1 - layer.momentum**count)
        mean, var = state.get(layer.batch_state_index)
        return mean / part, var / part

    def named(params):
        return {"scale": params.get("weight"), "bias": params.get("bias")}

    params = {name: getattr(layer, name) for name in ("weight", "bias")}
    params = {name: value for name, value in params.items() if value is not None}
    return JaxLayer(apply, params, state, statistics, named)


def from_keras(layer: Any) -> DifferentiableLayer:
    """`keras.layers.BatchNormalization` on the JAX backend as a layer for the parity tools.

    Args:
      layer: the layer, built; it stays as it is.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Raises:
      ValueError: the layer is not built, or Keras runs on another backend.

    Example:
      >>> import os
      >>> os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported for the first time
      >>> import keras, jaxbn.parity
      >>> norm = keras.layers.BatchNormalization()
      >>> norm.build((None, 4))
      >>> jaxbn.parity.identify(jaxbn.parity.from_keras(norm), 4)["epsilon"]
      0.001
    """
    import keras

    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on its {keras.backend.backend()} backend; set KERAS_BACKEND=jax in the "
            "environment before it is imported."
        )
    if not layer.built:
        raise ValueError("the layer is not built; call layer.build((None, num_features)).")
    trained, kept = layer.trainable_variables, layer.non_trainable_variables

    def apply(params, state, x, train):
        return layer.stateless_call(params, state, x, training=train)

    def index(variables, variable):
        return next((i for i, one in enumerate(variables) if one is variable), None)

    def statistics(state):
        return tuple(state[index(kept, v)] for v in (layer.moving_mean, layer.moving_variance))

    def named(params):
        places = {"scale": index(trained, layer.gamma), "bias": index(trained, layer.beta)}
        return {name: params[place] for name, place in places.items() if place is not None}

    params, state = ([v.value for v in variables] for variables in (trained, kept))
    laid_out = with_layout(apply, layer.axis, layer.input_spec.ndim)
    return JaxLayer(laid_out, params, state, statistics, named)


def from_torch(layer: Any) -> DifferentiableLayer:
    """`torch.nn.BatchNorm1d`, `2d` or `3d` as a layer for the parity tools.

    Args:
      layer: the layer, which stays as it is.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Raises:
      TypeError: the layer is another one, such as a `torch.nn.LayerNorm`.
      ValueError: the layer keeps no running statistics.

    Example:
      >>> import torch, jaxbn.parity
      >>> layer = jaxbn.parity.from_torch(torch.nn.BatchNorm2d(4))
      >>> for name, value in jaxbn.parity.identify(layer, 4).items():
      ...     print(name, value)
      momentum 0.9
      epsilon 1e-05
      batch_variance biased
      running_variance unbiased
    """
    if not (hasattr(layer, "running_mean") and hasattr(layer, "running_var")):
        raise TypeError(
            f"the layer must be a torch.nn.BatchNorm1d, 2d or 3d, or have the running_mean and "
            f"running_var of one, got {type(layer).__module__}.{type(layer).__qualname__}."
        )
    if layer.running_mean is None:
        raise ValueError("the layer keeps no running statistics; there is nothing to identify.")
    return TorchLayer(layer)
