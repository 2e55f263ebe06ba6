"""The Linen layer of batch renormalization."""

from jaxbn.linen._batch_norm import BatchNorm


class BatchRenorm(BatchNorm):
    """Normalize a batch as `jaxbn.batch_renorm` does, in a Flax Linen model.

    It has the variables and the arguments of `jaxbn.linen.BatchNorm`, so either layer can take the
    other's place in a trained model.

    Attributes:
      r_max: the largest ratio, either way, of the batch's standard deviation to the running one, at
        least 1.
      d_max: the largest shift of the batch's mean from the running mean, in running standard
        deviations, at least 0. The defaults, 3 and 5, are the paper's final values.

    The other attributes are those of `jaxbn.linen.BatchNorm`. For a warm-up, both limits may be
    traced: make them arguments of the model, or set them from outside, with
    `jaxbn.linen.override(model.apply, {"**": {"r_max": r_max, "d_max": d_max}})`.

    Example:
      >>> import jax, jaxbn.linen
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 16))
      >>> layer = jaxbn.linen.BatchRenorm(use_running_average=False, r_max=1.0, d_max=0.0)
      >>> variables = layer.init(jax.random.key(1), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> print(f"{abs(y.mean()):.1f} {y.std():.1f}")
      0.0 1.0
    """

    r_max: float = 3.0
    d_max: float = 5.0
