"""Protection of running statistics from batches that hold inf or NaN."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

from jaxbn._trees import unboxed_path

Tree = TypeVar("Tree")


def keep_finite(old: Any, new: Tree) -> Tree:
    r"""Return each layer's new statistics if all of them are finite, and otherwise its old ones.

    .. math::

        \mathrm{state} = \begin{cases}
            \mathrm{new} & \text{if every value of the layer's new state is finite} \\
            \mathrm{old} & \text{otherwise}
        \end{cases}

    Without this, a single batch with inf or NaN, which mixed precision with loss scaling produces
    now and then, would spoil the running averages forever. A layer keeps all of its old statistics:
    mean, variance and count. `optax.apply_if_finite` does the same for the parameters.

    Args:
      old: the state before a training step: that of one layer, or a tree of states, such as the
        collection `batch_stats` or `nnx.state(model, nnx.BatchStat)`. Each innermost mapping or
        sequence is a layer. None is returned unchanged. `old` may hold a `FrozenDict` where `new`
        holds a dict, and vice versa.
      new: the state after the step.

    Returns:
      A tree of the structure of `new`.

    Raises:
      ValueError: the structures of the trees, or the shapes of two leaves, differ.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbn
      >>> params, state = jaxbn.init((4, 2))
      >>> x = jnp.array([[1.0, 2], [3, 4], [5, 6], [jnp.inf, 8]])
      >>> y, new = jaxbn.batch_norm(params, state, x, train=True)
      >>> print(jnp.isfinite(new["mean"]), jaxbn.keep_finite(state, new)["mean"])
      [False  True] [0. 0.]
    """
    after, structure = jax.tree_util.tree_flatten_with_path(new)
    before, old_structure = jax.tree_util.tree_flatten_with_path(old)
    # A `FrozenDict` and a dict have different structures, but the same paths.
    old_leaves = dict(before)
    if old_leaves.keys() != dict(after).keys():
        raise ValueError(
            f"old and new must have the same structure, got {old_structure} and {structure}."
        )
    finite: dict[KeyPath, jax.Array] = {}
    for path, leaf in after:
        old_leaf = old_leaves[path]
        if jnp.shape(leaf) != jnp.shape(old_leaf):
            raise ValueError(
                f"old and new must have leaves of the same shape, got {jnp.shape(old_leaf)} and "
                f"{jnp.shape(leaf)} at {jax.tree_util.keystr(path)}."
            )
        layer = _layer(path)
        finite[layer] = finite.get(layer, jnp.array(True)) & jnp.all(jnp.isfinite(leaf))
    return structure.unflatten(
        jnp.where(finite[_layer(path)], leaf, old_leaves[path]) for path, leaf in after
    )


def _layer(path: KeyPath) -> KeyPath:
    """Return the path of the layer that a leaf belongs to."""
    return unboxed_path(path)[:-1]
