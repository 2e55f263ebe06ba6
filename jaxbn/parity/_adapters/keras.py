"""Wrap a batch norm of Keras on its JAX backend."""

from typing import Any

from jaxbn.parity._adapters.jax_function import JaxFunctionLayer, accept_matrix
from jaxbn.parity._layer import DifferentiableLayer


def keras_layer(layer: Any) -> DifferentiableLayer:
    """Wrap `keras.layers.BatchNormalization` on the JAX backend as a layer for the parity tools.

    `identify` compiles once for all layers with the same options and number of features, because a
    Keras layer is built for one number of features.

    Args:
      layer: the built layer. It is not changed.

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
      >>> jaxbn.parity.identify(jaxbn.parity.keras_layer(norm), 4)["epsilon"]
      0.001
    """
    import keras

    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Keras runs on its {keras.backend.backend()} backend; set KERAS_BACKEND=jax in the "
            "environment before importing it."
        )
    if not layer.built:
        raise ValueError("the layer is not built; call layer.build((None, num_features)).")
    trainable, non_trainable = layer.trainable_variables, layer.non_trainable_variables

    def apply(params, state, x, train):
        return layer.stateless_call(params, state, x, training=train)

    def index(variables, variable):
        return next((i for i, one in enumerate(variables) if one is variable), None)

    def statistics(state):
        moving = (layer.moving_mean, layer.moving_variance)
        return tuple(state[index(non_trainable, v)] for v in moving)

    def named(params):
        places = {"scale": index(trainable, layer.gamma), "bias": index(trainable, layer.beta)}
        return {name: params[place] for name, place in places.items() if place is not None}

    params, state = ([v.value for v in variables] for variables in (trainable, non_trainable))
    on_matrix = accept_matrix(apply, layer.axis, layer.input_spec.ndim)
    return JaxFunctionLayer(on_matrix, params, state, statistics, named)
