"""Run a Keras model on its JAX backend, and record its layers by replacing `Layer.__call__`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import jax

from jaxbn.parity._adapters.keras import keras_layer
from jaxbn.parity._layer import DifferentiableLayer
from jaxbn.parity._networks import layers
from jaxbn.parity._networks.jax_network import JaxNetwork, Recorder, TracedStatistics

# The attributes that hold the weights of a layer, and their names in Flax.
_PARAMS = {
    "kernel": "kernel",
    "embeddings": "embedding",
    "gamma": "scale",
}
_STATISTICS = {"moving_mean": "mean", "moving_variance": "var"}


class KerasNetwork(JaxNetwork):
    """A built Keras model. A layer's name is the path of the names from the model to it."""

    def __init__(self, label: str, model: Any):
        import keras

        if keras.backend.backend() != "jax":
            raise ValueError(
                f"Keras runs on its {keras.backend.backend()} backend; set KERAS_BACKEND=jax in "
                "the environment before importing it."
            )
        if not model.built:
            raise ValueError(f"the model in {label} is not built; call it on an input first.")
        self.model, self.layers = model, dict(_layers(model))
        values = [
            [v.value for v in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        ]
        super().__init__(label, values)

    def forward(
        self, variables: Any, x: jax.Array, train: bool, recorder: Recorder
    ) -> tuple[Any, TracedStatistics]:
        with _recording(recorder, {id(layer): name for name, layer in self.layers.items()}):
            output, state = self.model.stateless_call(*variables, x, training=train)
        after = {
            id(v): value for v, value in zip(self.model.non_trainable_variables, state, strict=True)
        }
        statistics = {
            name: (after[id(layer.moving_mean)], after[id(layer.moving_variance)])
            for name, layer in self.layers.items()
            if hasattr(layer, "moving_mean")
        }
        return output, statistics

    def batch_norm(self, name: str) -> DifferentiableLayer | None:
        layer = self.layers.get(name)
        return keras_layer(layer) if hasattr(layer, "moving_mean") else None

    def astype(self, dtype: str) -> Self:
        if any(v.dtype != dtype for v in self.model.weights if v.dtype.startswith("float")):
            raise TypeError(
                f"the layers in {self.label} compute in the dtype that they were made with, so "
                f"they cannot run in {dtype}."
            )
        return self


@contextmanager
def _recording(recorder: Recorder, names: Mapping[int, str]) -> Iterator[None]:
    """Record the calls of the layers with these ids and names."""
    import keras

    original = keras.layers.Layer.__call__

    def __call__(layer, *args, **kwargs):
        def call(*args, **kwargs):
            return original(layer, *args, **kwargs)

        name = names.get(id(layer))
        if name is None:
            return call(*args, **kwargs)
        if "Dropout" in type(layer).__name__ and kwargs.get("training") and layer.rate > 0:
            recorder.dropouts.append(name)
        axis = getattr(layer, "axis", None)
        return recorder.record(name, lambda: _facts(layer), axis, call, args, kwargs)

    keras.layers.Layer.__call__ = __call__  # pyright: ignore
    try:
        yield
    finally:
        keras.layers.Layer.__call__ = original


def _layers(parent: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for layer in parent._flatten_layers(include_self=False, recursive=False):
        here = (*path, layer.name)
        yield "/".join(here), layer
        yield from _layers(layer, here)


def _facts(layer: Any) -> layers.Facts | None:
    def shapes(attributes: Mapping[str, str]) -> dict[str, layers.Shape]:
        found = {name: getattr(layer, key, None) for key, name in attributes.items()}
        return {name: tuple(v.shape) for name, v in found.items() if v is not None}

    params, statistics = shapes(_PARAMS), shapes(_STATISTICS)
    kind = type(layer).__name__
    kernel = params.get("kernel")
    # The point-wise kernel of a separable convolution is a second one.
    if kernel is None or len(kernel) < 3 or kind.startswith("Separable"):
        return layers.of_flax(layer, params, statistics)
    if kind.startswith("Depthwise"):
        return layers.convolution((*kernel[:-2], 1, kernel[-2] * kernel[-1]), kernel[-2])
    if kind.endswith("Transpose"):
        return layers.transposed_convolution((*kernel[:-2], kernel[-1], kernel[-2]))
    return layers.convolution(kernel, getattr(layer, "groups", 1))
