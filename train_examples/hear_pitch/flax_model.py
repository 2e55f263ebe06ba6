"""The tiny CREPE in NNX."""

from itertools import pairwise

import jax
from flax import nnx

from jaxbn.nnx import BatchNorm
from train_examples.hear_pitch.torch_model import BINS, FEATURES


class Layer(nnx.Module):
    """A convolution over time, ReLU and only then the batch norm."""

    def __init__(
        self, features: tuple[int, int], kernel: int, strides: int, rngs: nnx.Rngs
    ) -> None:
        # "SAME" pads as the network does: 254 and 254 values, or 31 and 32.
        self.conv = nnx.Conv(*features, (kernel, 1), (strides, 1), rngs=rngs)
        self.norm = BatchNorm(features[1], epsilon=1e-3, use_running_average=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.max_pool(self.norm(nnx.relu(self.conv(x))), (2, 1), (2, 1))


class Crepe(nnx.Module):
    """A network from frames of sound, (N, 1024, 1, 1), to the probability of each pitch."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List()
        for k, features in enumerate(pairwise(FEATURES)):
            kernel, strides = (512, 4) if k == 0 else (64, 1)
            self.layers.append(Layer(features, kernel, strides, rngs))
        self.classifier = nnx.Linear(4 * FEATURES[-1], BINS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return jax.nn.sigmoid(self.classifier(x.reshape(len(x), -1)))
