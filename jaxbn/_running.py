"""The update of the running statistics."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxbn._complex import from_parts, is_complex, parts
from jaxbn._moments import Moments, statistics_dtype

Estimator = Literal["biased", "unbiased"]
State = Mapping[str, jax.Array]


def variance(batch: Moments, estimator: Estimator) -> jax.Array:
    """Return the biased variance (divided by n) or the unbiased one (by n - 1)."""
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
    r"""Move the state towards the statistics of a batch, and return it as a mapping of its kind.

    .. math::

        \mathrm{running} \leftarrow
            \mathrm{momentum} \cdot \mathrm{running} + (1 - \mathrm{momentum}) \cdot \mathrm{batch}

    `batches` holds the moments of one or several batches on its first axis. The state moves towards
    the mean of their statistics, also over the devices of `axis_name`. A batch with too few values
    is left out, and if all are, the old value is kept.
    """
    fewest = 2 if running_variance == "unbiased" else 1
    n_parts = 2 if is_complex(batches.mean) else 1
    sums = [
        *(_sum_existing(mean, batches.n >= 1) for mean in parts(batches.mean, n_parts)),
        _sum_existing(variance(batches, running_variance), batches.n >= fewest),
    ]
    if axis_name is not None:
        sums = lax.psum(jnp.asarray(sums), axis_name, axis_index_groups=axis_index_groups)
    *means, (var, with_var) = sums
    _, with_mean = means[0]

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

    old_means = parts(state["mean"], n_parts)
    new["mean"] = from_parts([move(old, *mean) for old, mean in zip(old_means, means, strict=True)])
    new["var"] = move(state["var"], var, with_var)
    return _like(state, new)


def _weights(
    momentum: ArrayLike | None, count: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Return the weights of the old value and of the batch, both in `dtype`."""
    if momentum is None:
        assert count is not None
        weight = 1 / jnp.maximum(count, 1).astype(dtype)
        return 1 - weight, weight
    if not isinstance(momentum, float):
        # In half precision 1 - momentum would be rounded; in float64 it is more accurate.
        momentum = jnp.asarray(momentum, statistics_dtype(dtype, getattr(momentum, "dtype", dtype)))
    return jnp.asarray(momentum, dtype), jnp.asarray(1 - momentum, dtype)


def _like(state: State, new: dict[str, jax.Array]) -> State:
    """Return `new` as a mapping of the kind of `state`, or as a dict if JAX does not know it."""
    structure = jax.tree.structure(state, is_leaf=lambda node: node is not state)
    if jax.tree_util.treedef_is_leaf(structure):
        return new
    place = structure.unflatten(range(structure.num_leaves))
    return structure.unflatten(new[name] for name in sorted(new, key=place.__getitem__))


def _sum_existing(values: jax.Array, exist: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(jnp.where(exist, values, 0), 0)
    # The zeros give the count the shape and the sharding of the total.
    return total, jnp.sum(exist, 0, dtype=values.dtype) + jnp.zeros_like(total)
