"""How running statistics move towards those of a batch."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._moments import Moments, statistics_dtype

Estimator = Literal["biased", "unbiased"]
State = Mapping[str, jax.Array]


def variance(batch: Moments, estimator: Estimator) -> jax.Array:
    """Return the variance by an estimator: divided by n (biased), or by n - 1 (unbiased)."""
    if estimator == "biased":
        return batch.var
    return batch.var * (batch.n / jnp.maximum(batch.n - 1, 1))


def update(
    state: State,
    batches: Moments,
    momentum: float | None,
    running_variance: Estimator,
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> State:
    r"""Return the state moved towards the statistics of a batch, as a mapping of its kind.

    .. math::

        \mathrm{running} \leftarrow
            \mathrm{momentum} \cdot \mathrm{running} + (1 - \mathrm{momentum}) \cdot \mathrm{batch}

    For several `batches`, on the first axis and on the devices of `axis_name`, it moves towards the
    mean of those with enough values; if none has, the old value is kept.
    """
    fewest = 2 if running_variance == "unbiased" else 1
    sums = [
        _sum_existing(batches.mean, batches.n >= 1),
        _sum_existing(variance(batches, running_variance), batches.n >= fewest),
    ]
    if axis_name is not None:
        sums = lax.psum(jnp.asarray(sums), axis_name, axis_index_groups=axis_index_groups)
    (mean, with_mean), (var, with_var) = sums

    new = {}
    if "count" in state:
        new["count"] = state["count"] + jnp.any(with_mean > 0).astype(state["count"].dtype)

    def move(running: jax.Array, total: jax.Array, n: jax.Array) -> jax.Array:
        dtype = statistics_dtype(running.dtype, total.dtype)
        old = running.astype(dtype).reshape(total.shape)
        batch = (total / jnp.maximum(n, 1)).astype(dtype)
        weight_of_old, weight_of_batch = _weights(momentum, new.get("count"), dtype)
        moved = weight_of_old * old + weight_of_batch * batch
        return jnp.where(n > 0, moved, old).reshape(running.shape)

    new["mean"] = move(state["mean"], mean, with_mean)
    new["var"] = move(state["var"], var, with_var)
    return _like(state, new)


def _weights(
    momentum: ArrayLike | None, count: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Return the weights of the old value and of the batch, in `dtype` whatever momentum's is."""
    if momentum is None:
        assert count is not None
        weight = 1 / jnp.maximum(count, 1).astype(dtype)
        return 1 - weight, weight
    if not isinstance(momentum, float):
        # Half precision would round the difference; float64 rounds it less than `dtype` does.
        momentum = jnp.asarray(momentum, statistics_dtype(dtype, getattr(momentum, "dtype", dtype)))
    return jnp.asarray(momentum, dtype), jnp.asarray(1 - momentum, dtype)


def _like(state: State, new: dict[str, jax.Array]) -> State:
    """Return `new` as a mapping of the kind of `state`, or a dict where JAX does not know it."""
    structure = jax.tree.structure(state, is_leaf=lambda node: node is not state)
    if jax.tree_util.treedef_is_leaf(structure):
        return new
    place = structure.unflatten(range(structure.num_leaves))
    return structure.unflatten(new[name] for name in sorted(new, key=place.__getitem__))


def _sum_existing(values: jax.Array, exist: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(jnp.where(exist, values, 0), 0)
    # Added to zeros, it has the shape of the total, and is sharded as that is.
    return total, jnp.sum(exist, 0, dtype=values.dtype) + jnp.zeros_like(total)
