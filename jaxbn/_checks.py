"""What bad input gets: each check returns its argument in normal form, or raises and says why."""

import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike


def floating_array(name: str, value: ArrayLike) -> jax.Array:
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"{name} must be an array of a floating dtype, got {value!r} of type "
            f"{type(value).__name__}."
        )
    try:
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        raise TypeError(
            f"{name} must be an array of NumPy or JAX, got a {type(value).__module__}."
            f"{type(value).__name__}."
        ) from None
    if not is_floating:
        raise TypeError(
            f"{name} must be of a floating dtype, got {dtype}; convert it, for instance with "
            f"{name}.astype(jnp.float32)."
        )
    if np.ndim(value) == 0:
        raise ValueError(f"{name} must have at least one axis, for the features; got a scalar.")
    return jnp.asarray(value)


def floating_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    if isinstance(dtype, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a floating dtype, got an array of {dtype.dtype}.")
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name} must be a floating dtype, got {dtype!r}.") from None
    if not jnp.issubdtype(result, jnp.floating):
        raise TypeError(f"{name} must be a floating dtype, got {result}.")
    return result


def python_bool(name: str, value: Any) -> bool:
    if isinstance(value, Tracer):
        raise ValueError(
            f"{name} must be a Python bool, got a traced {value.aval.str_short()}; make it a "
            f"static argument of jit, or branch with lax.cond over two calls."
        )
    if not isinstance(value, bool | np.bool_):
        raise ValueError(
            f"{name} must be a Python bool, got {value!r} of type {type(value).__name__}."
        )
    return bool(value)


def shape(value: Sequence[int]) -> tuple[int, ...]:
    try:
        result = tuple(operator.index(n) for n in value)
    except TypeError:
        result = None
    if not result or min(result) < 0:
        raise ValueError(
            f"shape must be the input's shape, a non-empty sequence of sizes, got {value!r}."
        )
    return result


def feature_axes(axis: int | Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes as increasing numbers from 0."""
    rank = len(shape)
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not given or not all(isinstance(a, int | np.integer) for a in given):
        raise ValueError(f"axis must be an integer or a sequence of them, got {axis!r}.")
    if not all(-rank <= a < rank for a in given):
        raise ValueError(
            f"axis={axis!r} is out of range for the shape {shape}: an axis must lie in "
            f"[{-rank}, {rank - 1}]."
        )
    axes = tuple(sorted(int(a) % rank for a in given))
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis={axis!r} names an axis of the shape {shape} twice.")
    return axes


def params(params: Any, x_shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    if not isinstance(params, Mapping):
        raise ValueError(
            f"params must be a mapping, got {type(params).__name__}; without scale and bias it "
            f"is {{}}."
        )
    if not params.keys() <= {"scale", "bias"}:
        raise ValueError(
            f"params may have the keys 'scale' and 'bias'; got {sorted(map(str, params))}."
        )
    for key, leaf in params.items():
        _leaf(f"params[{key!r}]", leaf, x_shape, axes)


def state(state: Any, x_shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    if state is None:
        return
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be a mapping or None, got {type(state).__name__}.")
    if not {"mean", "var"} <= state.keys() <= {"mean", "var", "count"}:
        raise ValueError(
            f"state must have the keys 'mean' and 'var', and may have 'count'; got "
            f"{sorted(map(str, state))}."
        )
    _leaf("state['mean']", state["mean"], x_shape, axes)
    _leaf("state['var']", state["var"], x_shape, axes)
    if "count" in state:
        _count(state["count"])


def momentum(momentum: Any, state: Mapping[str, Any] | None, train: bool) -> None:
    if momentum is None:
        if train and state is not None and "count" not in state:
            raise ValueError(
                "momentum=None, the cumulative average, needs the number of batches so far: "
                "state must have 'count', as init(..., track_count=True) makes it."
            )
        return
    if not _is_number(momentum) or not (isinstance(momentum, Tracer) or 0 <= momentum <= 1):
        raise ValueError(
            f"momentum must be None or lie in [0, 1], got {momentum!r}. It is the weight of the "
            f"old value: PyTorch's momentum is one minus it."
        )


def epsilon(epsilon: Any, use_batch: bool, dtype: jnp.dtype) -> None:
    is_traced = isinstance(epsilon, Tracer)
    if not _is_number(epsilon) or not (is_traced or 0 <= epsilon < math.inf):
        raise ValueError(f"epsilon must be a finite number, not negative, got {epsilon!r}.")
    smallest = float(jnp.finfo(dtype).tiny)
    if use_batch and not is_traced and epsilon < smallest:
        raise ValueError(
            f"epsilon must be at least {smallest:.2g}, the smallest normal number of {dtype}, "
            f"where the batch's own statistics normalize, got {epsilon!r}: a feature that is "
            f"constant in a batch would be divided by zero."
        )


def estimator(name: str, value: Any) -> None:
    if value not in ("biased", "unbiased"):
        raise ValueError(f"{name} must be 'biased' or 'unbiased', got {value!r}.")


def mask(mask: Any, x_shape: tuple[int, ...]) -> jax.Array | None:
    """The mask with as many axes as x."""
    if mask is None:
        return None
    dtype = getattr(mask, "dtype", None)
    if dtype != jnp.bool_:
        got = type(mask).__name__ if dtype is None else dtype
        raise TypeError(f"mask must be an array of booleans, got {got}.")
    mask = jnp.asarray(mask)
    fits = mask.ndim <= len(x_shape) and all(
        m in (1, n) for m, n in zip(mask.shape[::-1], x_shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask of shape {mask.shape} does not broadcast against x of shape {x_shape}."
        )
    return mask.reshape((1,) * (len(x_shape) - mask.ndim) + mask.shape)


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


def axis_name(
    axis_name: Hashable | None, axis_index_groups: Sequence[Sequence[int]] | None
) -> None:
    if axis_name is None:
        return
    names = axis_name if isinstance(axis_name, list | tuple) else (axis_name,)
    if not names or not all(isinstance(n, Hashable) and not isinstance(n, int) for n in names):
        raise ValueError(
            f"axis_name must be the name of a mapped axis, a tuple of them, or None, got "
            f"{axis_name!r}."
        )
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


def virtual_batch_size(
    size: Any, x_shape: tuple[int, ...], axes: tuple[int, ...], use_batch: bool
) -> tuple[int, int] | None:
    """The axis of the examples and a group's size, where there are groups to be made of them."""
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"virtual_batch_size must be None or a positive integer, got {size!r}.")
    if not use_batch:
        return None
    reduced = [a for a in range(len(x_shape)) if a not in axes]
    if not reduced or x_shape[reduced[0]] % size:
        examples = x_shape[reduced[0]] if reduced else 1
        raise ValueError(
            f"virtual_batch_size must divide the number of examples, {examples} in x of shape "
            f"{x_shape} with features on axis {_plain(axes)}, got {size}."
        )
    return reduced[0], int(size)


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
            f"x of shape {x_shape} has one value per feature (axis {_plain(axes)}){among}, which "
            f"has no unbiased variance; give more values, or batch_variance='biased' and "
            f"running_variance='biased'."
        )


def _devices(axis_name: Hashable | None, groups: Sequence[Sequence[int]] | None) -> int:
    if axis_name is None:
        return 1
    return lax.psum(1, axis_name, axis_index_groups=groups)


def _leaf(name: str, leaf: Any, x_shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    features = tuple(x_shape[a] for a in axes)
    keepdims = tuple(n if a in axes else 1 for a, n in enumerate(x_shape))
    if np.shape(leaf) not in (features, keepdims):
        raise ValueError(
            f"{name} must have the shape {features} or {keepdims} of the features of x, which has "
            f"shape {x_shape} with features on axis {_plain(axes)}; got {np.shape(leaf)}."
        )
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(leaf).__name__ if dtype is None else dtype
        raise TypeError(f"{name} must be an array of a floating dtype, got {got}.")


def _count(count: Any) -> None:
    dtype = getattr(count, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        got = type(count).__name__ if dtype is None else dtype
        raise TypeError(f"state['count'] must be a scalar array of an integer dtype, got {got}.")
    if np.shape(count) != ():
        raise ValueError(f"state['count'] must be a scalar, got one of shape {np.shape(count)}.")


def _is_number(value: Any) -> bool:
    """A real scalar, traced or not; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.generic | jax.Array):
        return False
    dtype = jnp.result_type(value)
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return real and np.ndim(value) == 0


def _plain(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    return axes[0] if len(axes) == 1 else axes
