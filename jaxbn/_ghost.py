"""Ghost batches: groups of examples, each with its own statistics (Hoffer et al., 2017)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn._moments import Moments, keep_only_moments

Normalize = Callable[..., tuple[jax.Array, Moments]]


def in_groups(normalize: Normalize, ghosts: tuple[int, int] | None) -> Normalize:
    """Return a function that applies `normalize` to groups of examples.

    `ghosts` is the axis of the examples and the size of a group. The last group is smaller if the
    size does not divide the number of examples. `normalize` gets its arguments with the groups on
    that axis and the examples of a group on the next. The returned function gives `y` in the shape
    of `x`, and moments stacked over groups on a new first axis. If `ghosts` is None, the whole
    batch is the only group. The backward pass keeps the arguments and the moments.
    """
    if ghosts is None:
        return _in_one_group(keep_only_moments(normalize))
    axis, size = ghosts

    def of_groups(x: jax.Array, *others: jax.Array | None) -> tuple[jax.Array, Moments]:
        groups, rest = _groups_and_rest(x.shape[axis], size)
        if rest == 0:
            apply = _in_equal_groups(keep_only_moments(normalize), axis, groups, size)
        elif groups == 0:
            apply = _in_equal_groups(keep_only_moments(normalize), axis, 1, rest)
        else:
            apply = keep_only_moments(_with_smaller_last(normalize, axis, size))
        return apply(x, *others)

    return of_groups


def _groups_and_rest(examples: int, size: int) -> tuple[int, int]:
    """Return the number of full groups, and the number of examples in the smaller last group."""
    groups = examples // size
    # If `examples` is symbolic, JAX finds that the full groups fit into this many examples, but it
    # would not find that `examples - examples % size` does.
    return groups, examples - groups * size


def _in_one_group(normalize: Normalize) -> Normalize:
    def whole(*arguments: jax.Array | None) -> tuple[jax.Array, Moments]:
        y, batch = normalize(*arguments)
        return y, jax.tree.map(lambda leaf: leaf[None], batch)

    return whole


def _in_equal_groups(normalize: Normalize, axis: int, groups: int, size: int) -> Normalize:
    def split(value: jax.Array | None) -> jax.Array | None:
        if value is None:
            return None
        sizes = (1, 1) if value.shape[axis] == 1 else (groups, size)
        return value.reshape(*value.shape[:axis], *sizes, *value.shape[axis + 1 :])

    def of_groups(x: jax.Array, *others: jax.Array | None) -> tuple[jax.Array, Moments]:
        y, batches = normalize(*map(split, (x, *others)))
        batches = Moments(*jnp.broadcast_arrays(*batches))
        return y.reshape(x.shape), jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), batches)

    return of_groups


def _with_smaller_last(normalize: Normalize, axis: int, size: int) -> Normalize:
    """Return a function that normalizes the full groups, and then the last group by itself.

    Padding the last group and masking the padding would need one call instead of two, but masked
    moments in float32 read the whole batch two more times. `keep_only_moments` must wrap the
    returned function, and not `normalize`: then the backward pass keeps the batch as it came, and
    no copies of its parts.
    """

    def of_groups(x: jax.Array, *others: jax.Array | None) -> tuple[jax.Array, Moments]:
        groups, rest = _groups_and_rest(x.shape[axis], size)

        def cut(value: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
            if value is None or value.shape[axis] == 1:
                return value, value
            # Its transpose is one concatenation, and that of two slices a sum of padded arrays.
            full, last = lax.split(value, (groups * size, rest), axis)
            return full, last

        full, last = zip(*map(cut, (x, *others)), strict=True)
        y_full, full_groups = _in_equal_groups(normalize, axis, groups, size)(*full)
        y_last, last_group = _in_equal_groups(normalize, axis, 1, rest)(*last)
        y = jnp.concatenate([y_full, y_last], axis)
        return y, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), full_groups, last_group)

    return of_groups
