"""Find the batch norms of a Keras model."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxbn.convert import _entries
from jaxbn.convert._entries import Params, State
from jaxbn.convert._keras import from_keras


def batch_norms_from_keras(model: Any) -> dict[str, tuple[Params, State]]:
    """Return jaxbn's params and state of every `BatchNormalization` in a Keras model.

    The convention is `jaxbn.KERAS`; `momentum`, `epsilon` and `axis` of each layer mean the same as
    in jaxbn. Layers are found by walking the model, so all its kinds can be nested: sequential and
    functional models, models and layers of derived classes, and wrappers.

    Args:
      model: a built `keras.Model`, or any built layer that contains others, of any backend.

    Returns:
      What `from_keras` returns for each, by the names of the layers that lead to it, without the
      model's own: "block/norm" for the layer "norm" in the nested model "block"; "" if the model is
      a single batch norm. Unlike `layer.path`, it always contains the names of nested models. A
      shared layer has its first path. If two layers side by side have the same name, the second is
      called "norm_1".

    Raises:
      ValueError: a batch norm is not built; all of them are listed.
      TypeError: `model` is not a Keras layer or model.

    Example:
      >>> import os
      >>> os.environ["KERAS_BACKEND"] = "jax"  # before Keras is imported for the first time
      >>> import keras
      >>> from jaxbn.convert import batch_norms_from_keras
      >>> layers = [keras.layers.Dense(8), keras.layers.BatchNormalization(name="norm")]
      >>> model = keras.Sequential(layers)
      >>> model.build((None, 4))
      >>> {path: state["mean"].shape for path, (_, state) in batch_norms_from_keras(model).items()}
      {'norm': (8,)}

    Source: `keras.layers.BatchNormalization`, Keras 3.
    """
    keras: Any = sys.modules.get("keras")
    if keras is None or not isinstance(model, keras.layers.Layer):
        raise TypeError(
            f"model must be a keras.Model or a keras.layers.Layer, got {type(model).__module__}."
            f"{type(model).__qualname__}."
        )
    found = {
        path: layer
        for path, layer in _walk(model, "", set())
        if isinstance(layer, keras.layers.BatchNormalization)
    }
    not_built = [path for path, layer in found.items() if not layer.built]
    what = "model has batch norms that are not built; call it, or model.build(input_shape)"
    _entries.raise_if_any(what, [", ".join(map(repr, not_built))] if not_built else [])
    return {
        path: from_keras({v.name: _values(v.value) for v in layer.variables})
        for path, layer in found.items()
    }


def _values(value: Any) -> np.ndarray:
    """Return a NumPy array. Keras donates its JAX arrays to its training steps."""
    return np.asarray(_entries.array(value))


def _walk(layer: Any, path: str, visited: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield all layers with their paths, each layer once."""
    visited.add(id(layer))
    yield path, layer
    names: set[str] = set()
    for child in layer._flatten_layers(include_self=False, recursive=False):
        name, number = child.name, 0
        while name in names:
            number += 1
            name = f"{child.name}_{number}"
        names.add(name)
        if id(child) not in visited:
            yield from _walk(child, f"{path}/{name}" if path else name, visited)
