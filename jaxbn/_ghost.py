"""Ghost batches: groups of examples with statistics of their own (Hoffer et al., 2017)."""

from collections.abc import Callable
from typing import Any

import jax


def in_groups(normalize: Callable[..., Any], axis: int, size: int) -> Callable[..., Any]:
    """`normalize(x, mask, ...)` of every `size` examples along `axis`; groups on a new first axis
    of its second result."""

    def split(value: jax.Array) -> jax.Array:
        groups = value.shape[axis] // size
        return value.reshape(*value.shape[:axis], groups, size, *value.shape[axis + 1 :])

    def of_groups(x: jax.Array, mask: jax.Array | None, *others: jax.Array) -> tuple[Any, Any]:
        mask_axis = None
        if mask is not None and mask.shape[axis] == x.shape[axis]:
            mask, mask_axis = split(mask), axis
        in_axes = (axis, mask_axis, *(None for _ in others))
        y, batches = jax.vmap(normalize, in_axes, out_axes=(axis, 0))(split(x), mask, *others)
        return y.reshape(x.shape), batches

    return of_groups
