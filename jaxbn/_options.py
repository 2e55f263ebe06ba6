"""What the Linen and NNX layers share: their options are checked, their inputs converted."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _checks


def check(layer: Any) -> None:
    """Raise if an option of the layer is bad, whatever the input.

    Without this, initialization would accept options that only a training step looks at.
    """
    if layer.use_running_average is not None:
        _checks.python_bool("use_running_average", layer.use_running_average)
    _checks.python_bool("use_bias", layer.use_bias)
    _checks.python_bool("use_scale", layer.use_scale)
    _checks.momentum(layer.momentum, None, train=False)
    _checks.epsilon(layer.epsilon, False, jnp.dtype(jnp.float32))
    if layer.dtype is not None:
        _checks.floating_dtype("dtype", layer.dtype)
    _checks.floating_dtype("param_dtype", layer.param_dtype)
    _checks.well_formed_axis_name(layer.axis_name)
    _checks.axis_index_groups(layer.axis_index_groups, layer.axis_name)
    _checks.estimator("batch_variance", layer.batch_variance)
    _checks.estimator("running_variance", layer.running_variance)
    _checks.virtual_batch_size(layer.virtual_batch_size, (1,), (), use_batch=False)


def floating_input(x: ArrayLike, dtype: DTypeLike | None) -> jax.Array:
    """Return `x` as Flax converts it: floating, and in float64 where `dtype` is."""
    is_array = isinstance(x, jax.Array | np.ndarray)
    if is_array and (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_):
        x = jnp.asarray(x, jnp.float32)
    x = _checks.floating_array("x", x)
    is_wider = dtype is not None and jax.dtypes.canonicalize_dtype(dtype) == jnp.float64
    return x.astype(jnp.float64) if is_wider else x


def boolean_mask(mask: ArrayLike | Sequence[Any] | None) -> Any:
    """Return a mask of numbers as booleans: nonzero where a value counts, as in Flax."""
    if isinstance(mask, list | tuple):
        mask = np.asarray(mask)
    if isinstance(mask, jax.Array | np.ndarray) and (
        jnp.issubdtype(mask.dtype, jnp.integer) or jnp.issubdtype(mask.dtype, jnp.floating)
    ):
        return jnp.asarray(mask) != 0
    return mask
