"""The data of one call of `batch_norm`, checked and in normal form."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _call_checks, _checks
from jaxbn._moments import statistics_dtype


class Call(NamedTuple):
    """The input, and what is known about a call before anything is computed.

    Attributes:
      x: the input, in its own dtype.
      mask: None, or booleans of the rank of `x`.
      feature_axes: the feature axes, as increasing numbers from 0.
      dtype: the dtype of the output.
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

    def feature(self, leaf: ArrayLike) -> jax.Array:
        """Return values per feature in the dtype of the statistics, broadcastable against `x`."""
        leaf = jnp.asarray(leaf, statistics_dtype(self.x.dtype))
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
    x = _checks.floating_array("x", x)
    feature_axes = _call_checks.feature_axes(axis, x.shape)
    _call_checks.params(params, x.shape, feature_axes)
    _call_checks.state(state, x.shape, feature_axes)
    train = _checks.python_bool("train", train)
    mask = _call_checks.mask(mask, x.shape)
    dtype = x.dtype if dtype is None else _checks.floating_dtype("dtype", dtype)
    use_batch = train or state is None
    ghosts = None
    if use_batch:
        ghosts = _call_checks.virtual_batch_size(virtual_batch_size, x, feature_axes)
    return Call(x, mask, feature_axes, dtype, ghosts, train, use_batch)
