"""One call of a batch norm, normalized with prescribed moments."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _call_checks, _layers
from jaxbn._batch_norm import batch_norm
from jaxbn._complex import complex_like, moments
from jaxbn._moments import Moments, statistics_dtype
from jaxbn._running import variance
from jaxbn.calibrate._observe import CallMoments


def normalize(
    layer: Any,
    x: jax.Array,
    mask: jax.Array | None,
    params: Mapping[str, jax.Array | None],
    prescribed: CallMoments | None,
    dtype: DTypeLike,
) -> tuple[jax.Array, CallMoments]:
    """Return the layer's output, and the moments of its input.

    Features without prescribed values are normalized with the moments of the input.
    """
    feature_axes = _call_checks.feature_axes(layer.axis, x.shape)
    mask = _call_checks.mask(_layers.boolean_mask(mask), x.shape)
    wide = x.astype(complex_like(x.dtype, statistics_dtype(x.dtype)))
    reduced_axes = tuple(a for a in range(x.ndim) if a not in feature_axes)
    observed = moments(wide, mask, None, x.dtype, reduced_axes)
    shape = observed.mean.shape
    observed = Moments(*(jnp.broadcast_to(value, shape) for value in observed))
    used = observed
    if prescribed is not None:
        given = Moments(*(jnp.asarray(value).reshape(shape) for value in prescribed[:4]))
        used = Moments(
            *(jnp.where(given.n > 0, a, b) for a, b in zip(given, observed, strict=True))
        )

    # The mean is subtracted here, because a state would round it to a single float.
    centered = (wide - used.mean_high) - used.mean_low
    var = variance(used, getattr(layer, "batch_variance", "biased"))
    y, _ = batch_norm(
        {name: leaf for name, leaf in params.items() if leaf is not None},
        {"mean": jnp.zeros_like(var), "var": var},
        centered,
        False,
        axis=layer.axis,
        epsilon=layer.epsilon,
        mask=mask,
        dtype=dtype,
    )
    leaf_shape = tuple(x.shape[a] for a in feature_axes)
    ddof = jnp.asarray(getattr(layer, "running_variance", "biased") == "unbiased", jnp.int32)
    return y, CallMoments(*(value.reshape(leaf_shape) for value in observed), ddof=ddof)
