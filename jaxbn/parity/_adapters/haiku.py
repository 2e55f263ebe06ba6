"""Wrap a batch norm of Haiku."""

from typing import Any

from jaxbn.parity._adapters.jax_function import JaxFunctionLayer
from jaxbn.parity._layer import DifferentiableLayer


def haiku_layer(transformed: Any, params: Any, state: Any) -> DifferentiableLayer:
    """Wrap a Haiku batch norm as a layer for the parity tools.

    `identify` compiles once for all layers with the same options and number of features, because
    the function may depend on this number.

    Args:
      transformed: `haiku.transform_with_state` of a function of `x` and `is_training` that applies
        one `haiku.BatchNorm`.
      params, state: as returned by `init` or by training.

    Returns:
      A layer with `train`, `evaluate`, `running` and `step`.

    Raises:
      ValueError: the state holds no batch norm, or several.

    Example:
      >>> import haiku as hk, jax.numpy as jnp, jaxbn.parity
      >>> norm = hk.transform_with_state(lambda x, train: hk.BatchNorm(True, True, 0.9)(x, train))
      >>> layer = jaxbn.parity.haiku_layer(norm, *norm.init(None, jnp.ones((8, 4)), True))
      >>> try:
      ...     jaxbn.parity.identify(layer, 4)
      ... except jaxbn.parity.ConventionError as error:
      ...     print(error.found["momentum"], error.found["averages"])
      0.9 bias-corrected
    """
    averages = [name for name in state if name.endswith("/mean_ema")]
    if len(averages) != 1:
        raise ValueError(
            f"the state holds {len(averages)} batch norms, {sorted(state)}; it must hold exactly "
            "one."
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

    return JaxFunctionLayer(apply, params, state, statistics, named)
