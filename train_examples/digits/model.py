"""The network."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Initializer
from jax.typing import DTypeLike

import jaxbn
from jaxbn.linen import BatchNorm

# A momentum of 0.9 lets moving averages settle within a short training, as Flax's 0.99 would not.
pytorch_norm = partial(BatchNorm, **jaxbn.PYTORCH)


class ConvNet(nn.Module):
    """Stages of two convolutions, batch-normalized each, with pooling between; then a dense layer.

    Attributes:
      widths: the number of channels of each stage.
      classes: the number of logits.
      norm: makes a normalization layer; called as `flax.linen.BatchNorm` is. By default it follows
        PyTorch's convention.
      kernel_init: initializer of the convolutions.
      dtype: the dtype of the convolutions and normalizations. Logits are float32 at least.
      use_bias: whether the convolutions have biases. By default they have none: the normalization
        would subtract it, and has one of its own.
    """

    widths: Sequence[int] = (32, 64)
    classes: int = 10
    norm: Callable[..., Callable[..., jax.Array]] = pytorch_norm
    kernel_init: Initializer = nn.initializers.he_normal()
    dtype: DTypeLike = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Logits of `images`, (N, height, width, channels); `mask`, (N,), is False over padding."""
        if mask is not None:
            mask = mask[:, None, None, None]
        x = images.astype(self.dtype)
        for stage, width in enumerate(self.widths):
            if stage > 0:
                x = nn.max_pool(x, (2, 2), strides=(2, 2))
            for _ in range(2):
                conv = nn.Conv(
                    width,
                    (3, 3),
                    use_bias=self.use_bias,
                    dtype=self.dtype,
                    kernel_init=self.kernel_init,
                )
                norm = self.norm(use_running_average=not train, dtype=self.dtype)
                x = nn.relu(norm(conv(x), mask=mask))
        logits = nn.Dense(self.classes, dtype=jnp.promote_types(self.dtype, jnp.float32))
        return logits(jnp.mean(x, (1, 2)))


def no_norm(**_: Any) -> Callable[..., jax.Array]:
    """A `norm` for `ConvNet` that stands in the place of a normalization and does nothing."""
    return lambda x, mask=None: x
