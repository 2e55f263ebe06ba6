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
    """Return the state moved towards the mean of the statistics of `batches`, where they exist.

    Each batch is an entry of the first axis of `batches`, here and on the devices of `axis_name`.
    The result is a mapping of the kind of `state`.
    """
    fewest = 2 if running_variance == "unbiased" else 1
    sums = [
        _sum_existing(batches.shift + batches.mean, batches.n >= 1),
        _sum_existing(variance(batches, running_variance), batches.n >= fewest),
    ]
    if axis_name is not None:
        sums = lax.psum(jnp.asarray(sums), axis_name, axis_index_groups=axis_index_groups)
    (mean, with_mean), (var, with_var) = sums

    new = {}
    if "count" in state:
        new["count"] = state["count"] + jnp.any(with_mean > 0).astype(state["count"].dtype)

    def moved(old: jax.Array, total: jax.Array, n: jax.Array) -> jax.Array:
        dtype = statistics_dtype(old.dtype, total.dtype)
        if momentum is None:
            weight = 1 / jnp.maximum(new["count"], 1).astype(dtype)
            old_weight = 1 - weight
        else:
            weight, old_weight = _weights(momentum, dtype)
        value = jnp.where(n > 0, weight * (total / jnp.maximum(n, 1)).astype(dtype), 0)
        kept = jnp.where(n > 0, old_weight, 1) * old.astype(dtype).reshape(total.shape)
        return (kept + value).reshape(old.shape)

    new["mean"] = moved(state["mean"], mean, with_mean)
    new["var"] = moved(state["var"], var, with_var)
    return _like(state, new)


def _weights(momentum: ArrayLike, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Return the weights of the batch and of the old value, in `dtype` whatever momentum's is."""
    if not isinstance(momentum, float):
        # Half precision would round the difference; float64 rounds it less than `dtype` does.
        momentum = jnp.asarray(momentum, statistics_dtype(dtype, getattr(momentum, "dtype", dtype)))
    return jnp.asarray(1 - momentum, dtype), jnp.asarray(momentum, dtype)


def _like(state: State, new: dict[str, jax.Array]) -> State:
    """Return `new` as a mapping of the kind of `state`, or a dict where JAX does not know it."""
    structure = jax.tree.structure(state, is_leaf=lambda node: node is not state)
    if jax.tree_util.treedef_is_leaf(structure):
        return new
    place = structure.unflatten(range(structure.num_leaves))
    return structure.unflatten(new[name] for name in sorted(new, key=place.__getitem__))


def _sum_existing(values: jax.Array, exist: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(jnp.where(exist, values, 0), 0)
    return total, jnp.broadcast_to(jnp.sum(exist, 0, dtype=values.dtype), total.shape)
