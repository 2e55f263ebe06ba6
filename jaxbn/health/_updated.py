"""Check in a training loop that running statistics are updated."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbn._patterns import as_text, matches
from jaxbn.calibrate._statistics import LayerPath, leaf_indices


def assert_updated(before: Any, after: Any, *, ignore: Sequence[str] = ()) -> None:
    """Raise unless a training step updated the running statistics of every batch norm.

    Call it after the first steps, outside `jax.jit`. It compares on the device, and copies only two
    bools per layer to the host.

    A layer was updated if any value of its mean or variance differs; its `count` is ignored.

    Args:
      before: the statistics before the step: a tree with the `mean` and `var` of each layer, such
        as `variables["batch_stats"]` or all variables. A step changes an NNX model in place, so
        take `nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))` before it.
      after: the statistics after the step: a tree with the same layers.
      ignore: patterns over the paths of layers that need not be updated, such as frozen ones:
        `["backbone/**"]`. They are those of `jaxbn.linen.override`.

    Raises:
      AssertionError: the statistics of some layers were not updated, or are not finite. The text
        gives their paths.
      ValueError: no batch norm is found; `before` and `after` differ in layers or shapes; the
        statistics are traced; or the step changed or donated `before`.

    Example:
      >>> import jax, jaxbn.linen
      >>> from jaxbn.health import assert_updated
      >>> x = jax.random.normal(jax.random.key(0), (8, 16))
      >>> layer = jaxbn.linen.BatchNorm(use_running_average=False)
      >>> variables = layer.init(jax.random.key(1), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> assert_updated(variables["batch_stats"], updates["batch_stats"])
    """
    _check_separate(before, after)
    old, new = _layers(before), _layers(after)
    new = {path: leaves for path, leaves in new.items() if not _is_ignored(path, ignore)}
    old = {path: leaves for path, leaves in old.items() if not _is_ignored(path, ignore)}
    if not new:
        raise ValueError("after must have the 'mean' and 'var' of at least one batch norm.")
    if old.keys() != new.keys():
        missing = sorted(_name(layer) for layer in old.keys() ^ new.keys())
        raise ValueError(
            f"before and after must have the same batch norms, got {', '.join(missing)} in only "
            f"one of them."
        )
    for layer, leaves in new.items():
        _check_leaves(layer, old[layer], leaves)
    moved, finite = np.asarray(_moved_and_finite([old[layer] for layer in new], list(new.values())))

    unmoved = [_name(layer) for layer, is_moved in zip(new, moved, strict=True) if not is_moved]
    infinite = [_name(layer) for layer, is_finite in zip(new, finite, strict=True) if not is_finite]
    texts = []
    if unmoved:
        texts.append(
            f"The training step did not update the running statistics of {len(unmoved)} of "
            f"{len(new)} batch norms: {', '.join(unmoved)}. In Linen, call `y, updates = "
            f"model.apply(variables, x, ..., mutable=['batch_stats'])` in training mode, and keep "
            f"the updates. In NNX, call `model.train()`, and return the state from functions that "
            f"JAX transforms."
        )
    if infinite:
        texts.append(
            f"The running statistics of {len(infinite)} of {len(new)} batch norms are not finite: "
            f"{', '.join(infinite)}. Look for NaN and infinity in the batch. To keep them out of "
            f"the statistics, use jaxbn.keep_finite."
        )
    if texts:
        raise AssertionError("\n".join(texts))


@jax.jit
def _moved_and_finite(
    old: list[tuple[jax.Array, ...]], new: list[tuple[jax.Array, ...]]
) -> jax.Array:
    """Return whether each layer moved, in the first row, and is finite, in the second."""

    def any_differs(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.any(
            jnp.stack([jnp.any(x != y.astype(x.dtype)) for x, y in zip(a, b, strict=True)])
        )

    def all_finite(leaves: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))

    moved = jnp.stack([any_differs(a, b) for a, b in zip(old, new, strict=True)])
    return jnp.stack([moved, jnp.stack([all_finite(leaves) for leaves in new])])


def _layers(tree: Any) -> dict[LayerPath, tuple[Any, ...]]:
    """Return the mean and the variance of each layer."""
    if isinstance(tree, Mapping) and "batch_stats" in tree:
        tree = tree["batch_stats"]
    leaves = jax.tree.leaves(tree)
    return {
        layer: (leaves[indices["mean"]], leaves[indices["var"]])
        for layer, indices in leaf_indices(tree).items()
        if {"mean", "var"} <= indices.keys()
    }


def _is_ignored(layer: LayerPath, patterns: Sequence[str]) -> bool:
    return any(matches(pattern, as_text(layer)) for pattern in patterns)


def _check_separate(before: Any, after: Any) -> None:
    """Check that the trees do not share variables of NNX, which a step changes in place."""
    old, new = (jax.tree.leaves(tree, is_leaf=_is_mutable) for tree in (before, after))
    shared = {id(leaf) for leaf in old if _is_mutable(leaf)}
    if any(id(leaf) in shared for leaf in new):
        raise ValueError(
            "before and after share their variables, so they are always equal. Before the step, "
            "copy the statistics: before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))."
        )


def _is_mutable(leaf: Any) -> bool:
    """Return whether a leaf has the interface of NNX's variables, without importing Flax."""
    return hasattr(leaf, "get_value") and hasattr(leaf, "set_value")


def _check_leaves(layer: LayerPath, old: tuple[Any, ...], new: tuple[Any, ...]) -> None:
    for a, b in zip(old, new, strict=True):
        if isinstance(a, Tracer) or isinstance(b, Tracer):
            raise ValueError(
                "before and after must hold concrete arrays, got traced ones: call assert_updated "
                "outside jax.jit and other transforms."
            )
        if isinstance(a, jax.Array) and a.is_deleted():
            raise ValueError(
                "before was donated to the training step: copy it before the step, with "
                "jax.tree.map(jnp.copy, before)."
            )
        if np.shape(a) != np.shape(b):
            raise ValueError(
                f"before and after must have the same shapes, got {np.shape(a)} and {np.shape(b)} "
                f"in {_name(layer)}."
            )


def _name(layer: LayerPath) -> str:
    return "/".join(map(str, layer)) or "the layer"
