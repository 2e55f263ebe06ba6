"""The initial parameters and state of a batch norm."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _call_checks, _checks
from jaxbn._complex import complex_like
from jaxbn._moments import statistics_dtype


def init(
    shape: Sequence[int],
    axis: int | Sequence[int] = -1,
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: DTypeLike = jnp.float32,
    keepdims: bool = False,
    track_count: bool = False,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Make the parameters and the state of a batch norm, for inputs of one shape.

    Args:
      shape: the shape of the input. Only the sizes along `axis` matter.
      axis: the feature axis, or axes; every other axis is reduced.
      use_scale: whether the parameters hold a `scale`, ones.
      use_bias: whether the parameters hold a `bias`, zeros.
      param_dtype: the dtype of the parameters. The state has it too, or float32 if that is wider.
        If it is complex, for complex inputs, the variance has the real dtype of its parts.
      keepdims: whether leaves have the shape that broadcasts against the input, such as
        (1, C, 1, 1), instead of (C,).
      track_count: whether the state counts training batches, which `momentum=None` needs.

    Returns:
      `params`, with `scale` and `bias`, and `state`, with `mean` (zeros), `var` (ones) and, with
      `track_count`, `count` (an int32 scalar, 0).

    Raises:
      ValueError: `shape` is not a sequence of sizes, or `axis` is out of its range.
      TypeError: `param_dtype` is not floating.

    Example:
      >>> import jax, jaxbn
      >>> params, state = jaxbn.init((64, 16, 32, 32), axis=1)
      >>> jax.tree.map(lambda leaf: leaf.shape, {**params, **state})
      {'bias': (16,), 'mean': (16,), 'scale': (16,), 'var': (16,)}
    """
    shape = _checks.shape(shape)
    feature_axes = _call_checks.feature_axes(axis, shape)
    param_dtype = _checks.inexact_dtype("param_dtype", param_dtype)
    var_dtype = statistics_dtype(param_dtype)
    mean_dtype = complex_like(param_dtype, var_dtype)
    kept = range(len(shape)) if keepdims else feature_axes
    leaf = tuple(shape[a] if a in feature_axes else 1 for a in kept)

    params = {}
    if use_scale:
        params["scale"] = jnp.ones(leaf, param_dtype)
    if use_bias:
        params["bias"] = jnp.zeros(leaf, param_dtype)
    state = {"mean": jnp.zeros(leaf, mean_dtype), "var": jnp.ones(leaf, var_dtype)}
    if track_count:
        state["count"] = jnp.zeros((), jnp.int32)
    return params, state
