"""The network of `train_examples.digits.train`, with options for what experiments vary."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import jaxbn
from jaxbn.linen import BatchNorm

pytorch_norm = partial(BatchNorm, **jaxbn.PYTORCH)


class ConvNet(nn.Module):
    """The network of `train_examples.digits.train`; without options, the same one.

    Attributes:
      widths: the number of channels of each stage.
      classes: the number of logits.
      norm: makes a normalization layer; called as `flax.linen.BatchNorm` is. By default it follows
        PyTorch's convention.
      dtype: the dtype of the convolutions and normalizations. Logits are float32 at least.
      use_bias: whether the convolutions have biases.
    """

    widths: Sequence[int] = (32, 64)
    classes: int = 10
    norm: Callable[..., Callable[..., jax.Array]] = pytorch_norm
    dtype: DTypeLike = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Return the logits of `images`, (N, height, width, channels).

        `mask`, (N,), is False for images that pad the batch.
        """
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
                    kernel_init=nn.initializers.he_normal(),
                )
                norm = self.norm(use_running_average=not train, dtype=self.dtype)
                x = nn.relu(norm(conv(x), mask=mask))
        logits = nn.Dense(self.classes, dtype=jnp.promote_types(self.dtype, jnp.float32))
        return logits(jnp.mean(x, (1, 2)))


def no_norm(**_: Any) -> Callable[..., jax.Array]:
    """Return the identity, as a `norm` of a `ConvNet` without normalization."""
    return lambda x, mask=None: x
