"""Wrap the frameworks' layers as black boxes that the parity tools can call.

Each adapter works on a copy of its layer, reshapes (N, C) to the layout that the layer wants, and
imports its framework only when called.
"""

from jaxbn.parity._adapters.equinox import equinox_layer as equinox_layer
from jaxbn.parity._adapters.flax import linen_layer as linen_layer
from jaxbn.parity._adapters.flax import nnx_layer as nnx_layer
from jaxbn.parity._adapters.haiku import haiku_layer as haiku_layer
from jaxbn.parity._adapters.jax_function import batch_norm_layer as batch_norm_layer
from jaxbn.parity._adapters.keras import keras_layer as keras_layer
from jaxbn.parity._adapters.torch import torch_layer as torch_layer
