"""What one call of `batch_norm` is given: checked, and in normal form."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _checks
from jaxbn._moments import statistics_dtype


class Call(NamedTuple):
    """The input, and what is known of the call before anything is computed.

    Attributes:
      x: the input, in the dtype that it came in.
      mask: None, or booleans of the rank of `x`.
      feature_axes: the feature axes, as increasing numbers from 0.
      dtype: the dtype of the output.
      ghosts: the axis of the examples and the size of a group of them, or None.
      train: whether the state moves.
      use_batch: whether the batch's own statistics normalize.
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
        """The axes that are reduced, once groups of examples have an axis of their own."""
        kept, rank = self.feature_axes, self.x.ndim
        if self.ghosts is not None:
            groups, _ = self.ghosts
            kept, rank = (groups, *(a + (a >= groups) for a in kept)), rank + 1
        return tuple(a for a in range(rank) if a not in kept)

    def feature(self, leaf: ArrayLike) -> jax.Array:
        """Return a value per feature in the statistics' dtype and a shape that broadcasts."""
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
    virtual_batch_size: Any,
) -> Call:
    """Return the call in normal form, or raise an error that names the argument."""
    x = _checks.floating_array("x", x)
    feature_axes = _checks.feature_axes(axis, x.shape)
    _checks.params(params, x.shape, feature_axes)
    _checks.state(state, x.shape, feature_axes)
    train = _checks.python_bool("train", train)
    mask = _checks.mask(mask, x.shape)
    dtype = x.dtype if dtype is None else _checks.floating_dtype("dtype", dtype)
    use_batch = train or state is None
    ghosts = _checks.virtual_batch_size(virtual_batch_size, x.shape, feature_axes, use_batch)
    return Call(x, mask, feature_axes, dtype, ghosts, train, use_batch)


def check_options(
    call: Call,
    state: Mapping[str, Any] | None,
    momentum: Any,
    epsilon: Any,
    batch_variance: Any,
    running_variance: Any,
    axis_name: Hashable | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> None:
    """Raise an error that names an option which is out of its range or does not fit the call."""
    _checks.momentum(momentum, state, call.train)
    _checks.epsilon(epsilon, call.use_batch, statistics_dtype(call.x.dtype))
    _checks.estimator("batch_variance", batch_variance)
    _checks.estimator("running_variance", running_variance)
    if momentum is None and call.mask is not None and call.train and state is not None:
        _checks.cumulative_average(call.mask.shape, call.feature_axes, running_variance)
    _checks.axis_index_groups(axis_index_groups, axis_name)
    if not call.use_batch:
        return
    _checks.axis_name(axis_name, axis_index_groups)
    if "unbiased" in (batch_variance, running_variance):
        # Devices share the values of a batch, but not those of a group.
        devices = (axis_name, axis_index_groups) if call.ghosts is None else (None, None)
        _checks.more_than_one_value(call.x.shape, call.feature_axes, call.ghosts, *devices)
