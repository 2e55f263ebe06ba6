"""Check arguments against the shapes, the dtype and the state of their call."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbn import _checks
from jaxbn._complex import complex_like, is_complex


def feature_axes(axis: int | Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the feature axes as increasing numbers from 0."""
    rank = len(shape)
    given = _checks.axis(axis)
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
    _checks.mapping(
        "params", params, optional=_checks.PARAMS, advice="; without scale and bias it is {}"
    )
    for key, leaf in params.items():
        _leaf(f"params[{key!r}]", leaf, x_shape, axes, jnp.inexact)


def state(state: Any, x: jax.Array, axes: tuple[int, ...]) -> None:
    if state is None:
        return
    _checks.mapping(
        "state",
        state,
        _checks.STATISTICS,
        optional=("count",),
        advice="; without statistics it is None",
    )
    _leaf("state['mean']", state["mean"], x.shape, axes, jnp.inexact)
    _leaf("state['var']", state["var"], x.shape, axes)
    if is_complex(state["mean"]) and not is_complex(x):
        raise TypeError(
            f"state['mean'] must be real where x is, got {state['mean'].dtype} for x of {x.dtype}."
        )
    if "count" in state:
        _count(state["count"])


def momentum(momentum: Any, state: Mapping[str, Any] | None, train: bool) -> None:
    if momentum is None and train and state is not None and "count" not in state:
        raise ValueError(
            "momentum=None, the cumulative average, needs the number of batches so far: "
            "state must have 'count', as init(..., track_count=True) makes it."
        )


def cumulative_average(
    mask_shape: tuple[int, ...], axes: tuple[int, ...], running_variance: str
) -> None:
    """Check that a masked batch has values for every statistic of every feature, or for none."""
    if any(mask_shape[a] != 1 for a in axes):
        raise ValueError(
            f"momentum=None, the cumulative average, counts batches for all features together, and "
            f"a mask that differs between features, such as one of shape {mask_shape} with "
            f"features on axis {plain(axes)}, may leave some of them without a value: give a mask "
            f"of size 1 along the features, or a momentum."
        )
    if running_variance == "unbiased":
        raise ValueError(
            "momentum=None, the cumulative average, counts batches for mean and variance together, "
            "and a batch in which a mask leaves one value has a mean but no unbiased variance: "
            "pass running_variance='biased', or a momentum."
        )


def epsilon(epsilon: Any, use_batch: bool, dtype: jnp.dtype) -> None:
    known = _checks.known_number(epsilon)
    if known is None:
        return
    largest, smallest = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    if known > largest:
        raise ValueError(
            f"epsilon must be at most {largest:.2g}, the largest finite number of {dtype}, got "
            f"{epsilon!r}."
        )
    if use_batch and known < smallest:
        raise ValueError(
            f"epsilon must be at least {smallest:.2g}, the smallest normal number of {dtype}, "
            f"where the batch's own statistics normalize, got {epsilon!r}: a feature that is "
            f"constant in a batch would be divided by zero."
        )


def mask(mask: Any, x_shape: tuple[int, ...]) -> jax.Array | None:
    """Return the mask with as many axes as `x`."""
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


def virtual_batch_size(
    size: int | None, x: jax.Array, axes: tuple[int, ...]
) -> tuple[int, int] | None:
    """Return the axis of the examples and the size of a group, or None without groups."""
    if size is None:
        return None
    reduced = [a for a in range(x.ndim) if a not in axes]
    if not reduced:
        raise ValueError(
            f"virtual_batch_size must be None if every axis is a feature axis: x has shape "
            f"{x.shape} with features on axis {plain(axes)}, got {size}."
        )
    axis = reduced[0]
    sharding = jax.typeof(x).sharding
    is_sharded = axis < len(sharding.spec) and sharding.spec[axis] is not None
    if is_sharded and x.shape[axis] > size:
        own = sharding.shard_shape(x.shape)[axis]
        if own % size:
            raise ValueError(
                f"virtual_batch_size must divide the number of examples on each device, {own} in "
                f"x of shape {x.shape}, which is explicitly sharded by {sharding.spec}, got {size}."
            )
    return axis, int(size)


def dtype(dtype: DTypeLike | None, x: jax.Array, params: Mapping[str, jax.Array]) -> jnp.dtype:
    """Return the dtype of the output, which is complex if the input or a parameter is."""
    values = {"x": x, **{f"params[{name!r}]": leaf for name, leaf in params.items()}}
    complex_ones = [name for name, value in values.items() if is_complex(value)]
    if dtype is None:
        is_widened = complex_ones and not is_complex(x)
        return complex_like(jnp.complex64, x.dtype) if is_widened else x.dtype
    result = _checks.inexact_dtype("dtype", dtype)
    if complex_ones and not jnp.issubdtype(result, jnp.complexfloating):
        raise TypeError(f"dtype must be complex if {complex_ones[0]} is, got {result}.")
    return result


def _leaf(
    name: str,
    leaf: Any,
    x_shape: tuple[int, ...],
    axes: tuple[int, ...],
    kind: type = jnp.floating,
) -> None:
    wanted = _leaf_shapes(x_shape, axes)
    if np.shape(leaf) not in wanted:
        others = [a for a in range(len(x_shape)) if np.shape(leaf) in _leaf_shapes(x_shape, (a,))]
        advice = ""
        if len(others) == 1:
            advice = f" If the features are on axis {others[0]}, pass axis={others[0]}."
        raise ValueError(
            f"{name} must have the shape {' or '.join(map(str, dict.fromkeys(wanted)))} of the "
            f"features of x, which has shape {x_shape} with features on axis {plain(axes)}; got "
            f"{np.shape(leaf)}.{advice}"
        )
    _checks.floating_leaf(name, leaf, kind)


def _leaf_shapes(x_shape: tuple[int, ...], axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes that a parameter may have: without and with the reduced axes."""
    features = tuple(x_shape[a] for a in axes)
    return [features, tuple(n if a in axes else 1 for a, n in enumerate(x_shape))]


def _count(count: Any) -> None:
    dtype = getattr(count, "dtype", None)
    is_integer = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    if not is_integer or jnp.iinfo(dtype).bits < 32:
        got = type(count).__name__ if dtype is None else dtype
        raise TypeError(
            f"state['count'] must be a scalar array of an integer dtype of at least 32 bits, such "
            f"as int32, got {got}."
        )
    if np.shape(count) != ():
        raise ValueError(f"state['count'] must be a scalar, got one of shape {np.shape(count)}.")


def plain(axes: tuple[int, ...]) -> int | tuple[int, ...]:
    """Return a single axis as a number, and several as they are, for messages."""
    return axes[0] if len(axes) == 1 else axes
