"""Statistics that outlive a batch which holds inf or NaN."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.tree_util import KeyPath

Tree = TypeVar("Tree")


def keep_finite(old: Any, new: Tree) -> Tree:
    r"""The new statistics of every layer where all are finite, and the old ones elsewhere.

    .. math::

        \mathrm{state} = \begin{cases}
            \mathrm{new} & \text{if every value of the layer's new state is finite} \\
            \mathrm{old} & \text{otherwise}
        \end{cases}

    One batch with an inf or a NaN in it, as mixed precision with loss scaling meets them, would
    otherwise stay in the running averages for good. A layer keeps its old statistics whole: mean,
    variance and count. The companion of `optax.apply_if_finite`, which does so for the parameters.

    Args:
      old: the state of one layer, or a tree of them, such as the collection `batch_stats` or
        `nnx.state(model, nnx.BatchStat)`, before a training step; None goes through. A layer is
        what lies in one innermost mapping or sequence. It may hold a `FrozenDict` where `new` has
        a dict, and the other way round.
      new: the same after it.

    Returns:
      A tree of the structure of `new`.

    Raises:
      ValueError: the trees, or the shapes of two leaves, differ.

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
    # Paths, unlike structures, are those of a `FrozenDict` and of a dict alike.
    old_leaves = dict(before)
    if old_leaves.keys() != dict(after).keys():
        raise ValueError(
            f"old and new must be trees of one structure, got {old_structure} and {structure}."
        )
    finite: dict[KeyPath, jax.Array] = {}
    for path, leaf in after:
        kept = old_leaves[path]
        if jnp.shape(leaf) != jnp.shape(kept):
            raise ValueError(
                f"old and new must have leaves of one shape, got {jnp.shape(kept)} and "
                f"{jnp.shape(leaf)} at {jax.tree_util.keystr(path)}."
            )
        layer = _layer(path)
        finite[layer] = finite.get(layer, jnp.array(True)) & jnp.all(jnp.isfinite(leaf))
    return structure.unflatten(
        jnp.where(finite[_layer(path)], leaf, old_leaves[path]) for path, leaf in after
    )


def _layer(path: KeyPath) -> KeyPath:
    """What leads to the layer: the path without the name of its leaf."""
    # Boxes, such as NNX's variables, hold their array as `value`.
    boxed = bool(path) and path[-1] == jax.tree_util.GetAttrKey("value")
    return path[: -2 if boxed else -1]
