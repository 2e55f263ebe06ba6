"""Ghost batches: groups of examples with statistics of their own (Hoffer et al., 2017)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbn._moments import Moments


def in_groups(
    normalize: Callable[..., tuple[jax.Array, Moments | None]], axis: int, size: int
) -> Callable[..., tuple[jax.Array, Moments]]:
    """`normalize` of arrays that have the groups of `size` examples on `axis`, and the examples of
    a group on the one after it. Of the moments, groups come on a new first axis."""

    def split(value: jax.Array) -> jax.Array:
        examples = value.shape[axis]
        groups = (1, 1) if examples == 1 else (examples // size, size)
        return value.reshape(*value.shape[:axis], *groups, *value.shape[axis + 1 :])

    def of_groups(x: jax.Array, *others: jax.Array | None) -> tuple[jax.Array, Moments]:
        y, batches = normalize(split(x), *(v if v is None else split(v) for v in others))
        assert batches is not None
        whole = Moments(*jnp.broadcast_arrays(*batches))
        return y.reshape(x.shape), jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), whole)

    return of_groups


def kept_axes(feature_axes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """The axes that are not reduced where groups are on `axis`: theirs, and the features'."""
    return (axis, *(a + (a >= axis) for a in feature_axes))
