"""Ghost batches: groups of examples, each with its own statistics (Hoffer et al., 2017)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxbn._moments import Moments


def in_groups(
    normalize: Callable[..., tuple[jax.Array, Moments]], ghosts: tuple[int, int] | None
) -> Callable[..., tuple[jax.Array, Moments]]:
    """Return a function that applies `normalize` to groups of examples.

    `ghosts` is the axis of the examples and the size of a group. `normalize` gets its arguments
    with the groups on that axis and the examples of a group on the next. The returned function
    gives `y` in the shape of `x`, and moments stacked over groups on a new first axis. If `ghosts`
    is None, the whole batch is the only group.
    """
    if ghosts is None:

        def whole(*arguments: jax.Array | None) -> tuple[jax.Array, Moments]:
            y, batch = normalize(*arguments)
            return y, jax.tree.map(lambda leaf: leaf[None], batch)

        return whole
    axis, size = ghosts

    def split(value: jax.Array | None) -> jax.Array | None:
        if value is None:
            return None
        examples = value.shape[axis]
        groups = (1, 1) if examples == 1 else (examples // size, size)
        return value.reshape(*value.shape[:axis], *groups, *value.shape[axis + 1 :])

    def of_groups(x: jax.Array, *others: jax.Array | None) -> tuple[jax.Array, Moments]:
        y, batches = normalize(*map(split, (x, *others)))
        batches = Moments(*jnp.broadcast_arrays(*batches))
        return y.reshape(x.shape), jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), batches)

    return of_groups
