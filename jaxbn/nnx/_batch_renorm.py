"""The NNX layer of batch renormalization."""

from collections.abc import Sequence
from typing import Any

from flax import nnx

from jaxbn.nnx._batch_norm import BatchNorm


class BatchRenorm(BatchNorm):
    """Normalize a batch as `jaxbn.batch_renorm` does, in a Flax NNX model.

    It has the variables and the arguments of `jaxbn.nnx.BatchNorm`, so either layer can take the
    other's place in a trained model.

    Attributes:
      r_max: the largest ratio, either way, of the batch's standard deviation to the running one, at
        least 1.
      d_max: the largest shift of the batch's mean from the running mean, in running standard
        deviations, at least 0. The defaults, 3 and 5, are the paper's final values.

    The other attributes are those of `jaxbn.nnx.BatchNorm`. For a warm-up, set both limits between
    steps, with `jaxbn.nnx.override(model, {"**": {"r_max": r_max, "d_max": d_max}})`. If the limits
    are arrays, such as `jnp.array(1.5)`, a step under `nnx.jit` is not recompiled. As arrays, they
    are leaves of the model, so `nnx.split` then needs a final filter `...` for them.

    Example:
      >>> import jax, jaxbn.nnx
      >>> from flax import nnx
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 16))
      >>> layer = jaxbn.nnx.BatchRenorm(16, r_max=1.0, d_max=0.0, rngs=nnx.Rngs(0))
      >>> y = layer(x)
      >>> print(f"{abs(y.mean()):.1f} {y.std():.1f}")
      0.0 1.0
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        r_max: float | nnx.Variable = 3.0,
        d_max: float | nnx.Variable = 5.0,
        **options: Any,
    ):
        # The constructor of the base class checks them, too.
        self.r_max = r_max
        self.d_max = d_max
        super().__init__(num_features, **options)
