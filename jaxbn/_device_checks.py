"""What bad input about devices gets: names of mapped axes, groups of their indices."""

import math
from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jax import lax


def axis_index_groups(groups: Sequence[Sequence[int]] | None, axis_name: Hashable | None) -> None:
    if groups is None:
        return
    are_groups = isinstance(groups, Sequence) and all(
        isinstance(group, Sequence) and all(isinstance(i, int | np.integer) for i in group)
        for group in groups
    )
    if not are_groups:
        raise ValueError(
            f"axis_index_groups must be a sequence of groups of indices, such as [[0, 1], [2, 3]], "
            f"got {groups!r}."
        )
    if axis_name is None:
        raise ValueError(
            f"axis_index_groups={groups!r} are groups of an axis: axis_name must name it, got None."
        )


def well_formed_axis_name(axis_name: Hashable | Sequence[Hashable] | None) -> None:
    """Check that `axis_name` can be a name, whether or not it is bound."""
    if axis_name is None:
        return
    names = _names(axis_name)
    if not names or not all(isinstance(n, Hashable) and not isinstance(n, int) for n in names):
        raise ValueError(
            f"axis_name must be the name of a mapped axis, a tuple of them, or None, got "
            f"{axis_name!r}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"axis_name must name each mapped axis once, got {axis_name!r}.")


def axis_name(
    axis_name: Hashable | Sequence[Hashable] | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> None:
    """Check that `axis_name` names mapped axes around the call, which have the groups."""
    well_formed_axis_name(axis_name)
    if axis_name is None:
        return
    try:
        size = _devices(axis_name, None)
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound: call batch_norm inside a vmap, pmap or "
            f"shard_map that names it, or pass axis_name=None."
        ) from None
    if axis_index_groups is None:
        return
    sizes = {len(group) for group in axis_index_groups}
    members = sorted(index for group in axis_index_groups for index in group)
    if len(sizes) != 1 or members != list(range(size)):
        raise ValueError(
            f"axis_index_groups={axis_index_groups!r} must be groups of one size that hold each "
            f"index of axis_name={axis_name!r}, 0 to {size - 1}, once."
        )
    if not _has_groups(axis_name, axis_index_groups):
        raise ValueError(
            f"axis_index_groups={axis_index_groups!r} need an axis of pmap, or of shard_map with "
            f"check_vma=False, as JAX has no groups elsewhere: axis_name={axis_name!r} is an axis "
            f"of vmap, or of shard_map with check_vma=True."
        )


def more_than_one_value(
    x_shape: tuple[int, ...],
    axes: tuple[int, ...],
    ghosts: tuple[int, int] | None,
    axis_name: Hashable | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> None:
    sizes = dict(enumerate(x_shape)) | dict([ghosts] if ghosts else [])
    own = math.prod(n for a, n in sizes.items() if a not in axes)
    if own * _devices(axis_name, axis_index_groups) == 1:
        among = f" and group of virtual_batch_size={ghosts[1]}" if ghosts else ""
        raise ValueError(
            f"x of shape {x_shape} has one value per feature (axis {plain(axes)}){among}, which "
            f"has no unbiased variance; give more values, or batch_variance='biased' and "
            f"running_variance='biased'."
        )


def _names(axis_name: Hashable | Sequence[Hashable]) -> Sequence[Hashable]:
    return axis_name if isinstance(axis_name, list | tuple) else (axis_name,)


def _has_groups(axis_name: Hashable | Sequence[Hashable], groups: Sequence[Sequence[int]]) -> bool:
    """Whether JAX implements collectives of groups of this axis."""
    # The axes of pmap and shard_map are manual axes of a mesh; those of vmap are not. Asking the
    # mesh first matters in a jit within a vmap, where JAX would raise after this trace only.
    if not set(_names(axis_name)) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        return False
    try:
        jax.eval_shape(
            lambda: lax.psum(lax.axis_index(axis_name), axis_name, axis_index_groups=groups)
        )
    except NotImplementedError:
        return False
    return True


def _devices(axis_name: Hashable | None, groups: Sequence[Sequence[int]] | None) -> int:
    if axis_name is None:
        return 1
    return lax.psum(1, axis_name, axis_index_groups=groups)


def plain(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    """One axis as a number, several as they are, for messages."""
    return axes[0] if len(axes) == 1 else axes
