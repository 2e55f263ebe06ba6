"""The data of one call of `batch_norm`, checked and in normal form."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _call_checks, _checks
from jaxbn._complex import complex_like
from jaxbn._moments import statistics_dtype


class Call(NamedTuple):
    """The input, and what is known about a call before anything is computed.

    Attributes:
      x: the input, in its own dtype.
      mask: None, or booleans of the rank of `x`.
      feature_axes: the feature axes, as increasing numbers from 0.
      dtype: the dtype of the output. It is complex if `x` or a parameter is.
      ghosts: the axis of the examples and the size of a group, or None without ghost batches.
      train: whether the state is updated.
      use_batch: whether the statistics of the batch normalize it.
    """

    x: jax.Array
    mask: jax.Array | None
    feature_axes: tuple[int, ...]
    dtype: jnp.dtype
    ghosts: tuple[int, int] | None
    train: bool
    use_batch: bool

    @property
    def axes(self) -> tuple[int, ...]:
        """The reduced axes, numbered as if groups of examples already had an axis of their own."""
        kept, rank = self.feature_axes, self.x.ndim
        if self.ghosts is not None:
            groups, _ = self.ghosts
            kept, rank = (groups, *(a + (a >= groups) for a in kept)), rank + 1
        return tuple(a for a in range(rank) if a not in kept)

    @property
    def var_dtype(self) -> jnp.dtype:
        return statistics_dtype(self.x.dtype)

    @property
    def mean_dtype(self) -> jnp.dtype:
        return complex_like(self.x.dtype, self.var_dtype)

    @property
    def params_dtype(self) -> jnp.dtype:
        return complex_like(self.dtype, self.var_dtype)

    def feature(self, leaf: ArrayLike, dtype: jnp.dtype) -> jax.Array:
        """Return values per feature, broadcastable against `x`."""
        leaf = jnp.asarray(leaf, dtype)
        shape = [n if a in self.feature_axes else 1 for a, n in enumerate(self.x.shape)]
        return leaf.reshape(shape) if leaf.ndim else jnp.full(shape, leaf)


def checked(
    params: Any,
    state: Any,
    x: ArrayLike,
    train: Any,
    axis: int | Sequence[int],
    mask: Any,
    dtype: Any,
    virtual_batch_size: int | None,
) -> Call:
    """Return the call in normal form, or raise an error that names the argument."""
    x = _checks.inexact_array("x", x)
    feature_axes = _call_checks.feature_axes(axis, x.shape)
    _call_checks.params(params, x.shape, feature_axes)
    _call_checks.state(state, x, feature_axes)
    train = _checks.python_bool("train", train)
    mask = _call_checks.mask(mask, x.shape)
    dtype = _call_checks.dtype(dtype, x, params)
    use_batch = train or state is None
    ghosts = None
    if use_batch:
        ghosts = _call_checks.virtual_batch_size(virtual_batch_size, x, feature_axes)
    return Call(x, mask, feature_axes, dtype, ghosts, train, use_batch)
