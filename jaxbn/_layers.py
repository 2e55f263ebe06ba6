"""What the Linen and NNX layers share: checks of their options, conversions of their inputs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _checks
from jaxbn._batch_norm import batch_norm
from jaxbn._batch_renorm import batch_renorm
from jaxbn._complex import is_complex
from jaxbn._moments import statistics_dtype
from jaxbn._options import Options


def checked_options(layer: Any) -> dict[str, Any]:
    """Return the options that a layer hands on to `batch_norm`, once all its options are valid.

    Without this check, initialization would accept options that only a training step uses.
    """
    options = Options.of(layer)
    options.check()
    if layer.use_running_average is not None:
        _checks.python_bool("use_running_average", layer.use_running_average)
    for name in ("use_bias", "use_scale", "frozen", "track"):
        _checks.python_bool(name, getattr(layer, name))
    if layer.dtype is not None:
        _checks.inexact_dtype("dtype", layer.dtype)
    _checks.inexact_dtype("param_dtype", layer.param_dtype)
    if (limits := _renorm_limits(layer)) is not None:
        _checks.renorm_limit("r_max", limits["r_max"], least=1)
        _checks.renorm_limit("d_max", limits["d_max"], least=0)
    return options._asdict()


def function_of(layer: Any) -> Callable[..., tuple[jax.Array, Any]]:
    """Return `batch_norm`, or `batch_renorm` with the limits that a layer has."""
    limits = _renorm_limits(layer)
    return batch_norm if limits is None else partial(batch_renorm, **limits)


def _renorm_limits(layer: Any) -> dict[str, Any] | None:
    """Return `r_max` and `d_max` of a layer for batch renormalization, and None for others.

    A layer that has only one of them, by a rule, is meant for it too. The other limit is then None,
    which the checks refuse. In an NNX layer they may be variables.
    """
    names = ("r_max", "d_max")
    if not any(hasattr(layer, name) for name in names):
        return None
    limits: dict[str, Any] = {name: getattr(layer, name, None) for name in names}
    return {k: v.get_value() if hasattr(v, "get_value") else v for k, v in limits.items()}


def floating_input(x: ArrayLike, dtype: DTypeLike | None) -> jax.Array:
    """Return `x` as Flax converts it: floating, and of 64-bit numbers if `dtype` is."""
    is_array = isinstance(x, jax.Array | np.ndarray)
    if is_array and (jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_):
        x = jnp.asarray(x, jnp.float32)
    x = _checks.inexact_array("x", x)
    if dtype is None or statistics_dtype(jax.dtypes.canonicalize_dtype(dtype)) != jnp.float64:
        return x
    return x.astype(jnp.complex128 if is_complex(x) else jnp.float64)


def boolean_mask(mask: ArrayLike | Sequence[Any] | None) -> Any:
    """Return a mask of numbers as booleans: nonzero where a value counts, as in Flax."""
    if isinstance(mask, list | tuple):
        mask = np.asarray(mask)
    if isinstance(mask, jax.Array | np.ndarray) and (
        jnp.issubdtype(mask.dtype, jnp.integer) or jnp.issubdtype(mask.dtype, jnp.floating)
    ):
        return jnp.asarray(mask) != 0
    return mask
