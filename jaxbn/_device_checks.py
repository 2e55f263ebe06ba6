"""Check the names and groups of devices against the mapped axes around the call."""

import math
from collections.abc import Hashable, Sequence

import jax
from jax import lax

from jaxbn._call_checks import plain
from jaxbn._checks import names_of


def axis_name(
    axis_name: Hashable | Sequence[Hashable] | None,
    axis_index_groups: Sequence[Sequence[int]] | None,
) -> None:
    """Check that `axis_name` names mapped axes around the call, and that these can be grouped."""
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
    sizes = dict(enumerate(x_shape))
    among = ""
    if ghosts is not None:
        examples, size = ghosts
        sizes[examples] = x_shape[examples] % size or size
        among = f" in the last group of virtual_batch_size={size}"
    own = math.prod(n for a, n in sizes.items() if a not in axes)
    if own * _devices(axis_name, axis_index_groups) == 1:
        raise ValueError(
            f"x of shape {x_shape} has one value per feature (axis {plain(axes)}){among}, which "
            f"has no unbiased variance; give more values, or batch_variance='biased' and "
            f"running_variance='biased'."
        )


def _has_groups(axis_name: Hashable | Sequence[Hashable], groups: Sequence[Sequence[int]]) -> bool:
    """Return whether JAX implements collectives over groups of this axis."""
    # The axes of pmap and shard_map are manual axes of a mesh; those of vmap are not. The mesh is
    # checked first because in a jit within a vmap JAX would raise only after this trace.
    if not set(names_of(axis_name)) <= set(jax.sharding.get_abstract_mesh().manual_axes):
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
