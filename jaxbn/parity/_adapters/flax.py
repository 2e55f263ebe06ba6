"""Wrap batch norms of Flax, Linen and NNX, and this library's drop-in layers for them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxbn.parity._adapters.jax_function import JaxFunctionLayer, accept_matrix, mean_and_var
from jaxbn.parity._layer import DifferentiableLayer


def linen_layer(module: Any, variables: Mapping[str, Any]) -> DifferentiableLayer:
    """Wrap `flax.linen.BatchNorm`, or `jaxbn.linen.BatchNorm`, as a layer for the parity tools.

    Args:
      module: the module. Its axis name and groups are removed, because the probes run on one
        device.
      variables: `params` and `batch_stats`, as returned by `init` or by training.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Raises:
      ValueError: the module's `axis` is not a single axis.

    Example:
      >>> import flax.linen, jax, jax.numpy as jnp, jaxbn.parity
      >>> module = flax.linen.BatchNorm(use_running_average=False, momentum=0.9)
      >>> variables = module.init(jax.random.key(0), jnp.ones((8, 4)))
      >>> jaxbn.parity.identify(jaxbn.parity.linen_layer(module, variables), 4)["momentum"]
      0.9
    """
    unmapped = {k: None for k in ("axis_name", "axis_index_groups") if hasattr(module, k)}
    module = module.clone(parent=None, name=None, use_running_average=None, **unmapped)
    apply = accept_matrix(_Linen(module), module.axis)
    return JaxFunctionLayer(
        apply,
        variables.get("params", {}),
        variables["batch_stats"],
        mean_and_var,
        with_features=lambda _: apply,
    )


def nnx_layer(layer: Any) -> DifferentiableLayer:
    """Wrap `flax.nnx.BatchNorm`, or `jaxbn.nnx.BatchNorm`, as a layer for the parity tools.

    Args:
      layer: the layer. It is copied, not changed. The copy has no axis name and no groups, because
        the probes run on one device.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Raises:
      ValueError: the layer's `axis` is not a single axis.

    Example:
      >>> import jaxbn.parity
      >>> from flax import nnx
      >>> layer = nnx.BatchNorm(4, epsilon=1e-3, rngs=nnx.Rngs(0))
      >>> jaxbn.parity.identify(jaxbn.parity.nnx_layer(layer), 4)["epsilon"]
      0.001
    """
    from flax import nnx

    layer = nnx.clone(layer)
    layer.axis_name = layer.axis_index_groups = None
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def with_features(number):
        other = nnx.merge(graph, params, state, copy=True)
        other.num_features = number
        return accept_matrix(_Nnx(nnx.split(other)[0]), layer.axis)

    def statistics(state):
        return state["mean"][...], state["var"][...]

    def named(params):
        return {name: params[name][...] for name in ("scale", "bias") if name in params}

    apply = accept_matrix(_Nnx(graph), layer.axis)
    return JaxFunctionLayer(apply, params, state, statistics, named, with_features)


class _Linen(NamedTuple):
    """A Linen module as a function. Modules with equal options make equal functions."""

    module: Any

    def __call__(self, params: Any, state: Any, x: jax.Array, train: bool) -> Any:
        y, updates = self.module.apply(
            {"params": params, "batch_stats": state},
            x,
            use_running_average=not train,
            mutable=["batch_stats"],
        )
        return y, updates["batch_stats"]


class _Nnx(NamedTuple):
    """An NNX layer as a function. Layers with equal options make equal functions."""

    graph: Any

    def __call__(self, params: Any, state: Any, x: jax.Array, train: bool) -> Any:
        from flax import nnx

        layer = nnx.merge(self.graph, params, state, copy=True)
        y = layer(x, use_running_average=not train)
        return y, nnx.split(layer, nnx.Param, ...)[2]
