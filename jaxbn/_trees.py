"""Trees of variables whose leaves may be in boxes of Flax."""

from typing import Any

from jax.tree_util import GetAttrKey, KeyPath


def unboxed_path(path: KeyPath) -> KeyPath:
    """Return the path of a leaf, without the last step if that leads into a box.

    Boxes, such as NNX's variables and Linen's partitioned parameters, hold their array as `value`.
    """
    return path[:-1] if path and path[-1] == GetAttrKey("value") else path


def is_box(leaf: Any) -> bool:
    """Return whether a leaf has the interface of Flax's `AxisMetadata`, without importing Flax."""
    return hasattr(leaf, "unbox") and hasattr(leaf, "replace_boxed")
