"""What bad input gets: each check returns its argument in normal form, or raises and says why."""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jaxbn._device_checks import axis_index_groups as axis_index_groups
from jaxbn._device_checks import axis_name as axis_name
from jaxbn._device_checks import more_than_one_value as more_than_one_value
from jaxbn._device_checks import plain
from jaxbn._device_checks import well_formed_axis_name as well_formed_axis_name

# The keys of params and of state, which may also have a `count`.
PARAMS, STATISTICS = ("scale", "bias"), ("mean", "var")

# Floating dtypes that no batch norm can be computed with, and why.
_UNUSABLE = {
    "float8_e8m0fnu": "which has neither zero nor negative values",
    "float6_e2m3fn": "which XLA does not compute with",
    "float6_e3m2fn": "which XLA does not compute with",
}


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
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} must be of a real floating dtype, got {dtype}: complex numbers are not "
            f"supported."
        )
    if not is_floating:
        raise TypeError(
            f"{name} must be of a floating dtype, got {dtype}; convert it, for instance with "
            f"{name}.astype(jnp.float32)."
        )
    _usable(name, dtype)
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
    _usable(name, result)
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
    if not given or not all(
        isinstance(a, int | np.integer) and not isinstance(a, bool) for a in given
    ):
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


def mapping(
    name: str,
    value: Any,
    required: Sequence[str] = (),
    *,
    optional: Sequence[str] | None = None,
    advice: str = "",
) -> None:
    """Check that a value is a mapping and, where `optional` is given, that it has the right keys."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(value).__name__}{advice}.")
    if optional is None or set(required) <= value.keys() <= {*required, *optional}:
        return
    must, may = (" and ".join(map(repr, keys)) for keys in (required, optional))
    wanted = f"must have the keys {must}, and may have" if required else "may have the keys"
    raise ValueError(f"{name} {wanted} {may}; got {sorted(map(str, value))}.")


def floating_leaf(name: str, leaf: Any) -> None:
    """Check the dtype of a parameter or a statistic."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(leaf).__name__ if dtype is None else dtype
        raise TypeError(f"{name} must be an array of a floating dtype, got {got}.")
    _usable(name, dtype)


def params(params: Any, x_shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    mapping("params", params, optional=PARAMS, advice="; without scale and bias it is {}")
    for key, leaf in params.items():
        _leaf(f"params[{key!r}]", leaf, x_shape, axes)


def state(state: Any, x_shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    if state is None:
        return
    mapping(
        "state", state, STATISTICS, optional=("count",), advice="; without statistics it is None"
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
    known = _known(momentum)
    if known is not None and not 0 <= known <= 1:
        raise ValueError(
            f"momentum must be None or lie in [0, 1], got {momentum!r}. It is the weight of the "
            f"old value: PyTorch's momentum is one minus it."
        )


def cumulative_average(
    mask_shape: tuple[int, ...], axes: tuple[int, ...], running_variance: str
) -> None:
    """Check that a masked batch has a value for all features and both statistics, or for none."""
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
    known = _known(epsilon)
    if known is None:
        return
    if not 0 <= known < math.inf:
        raise ValueError(f"epsilon must be a finite number, not negative, got {epsilon!r}.")
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
            f"{x_shape} with features on axis {plain(axes)}, got {size}."
        )
    return reduced[0], int(size)


def _leaf(name: str, leaf: Any, x_shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
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
    floating_leaf(name, leaf)


def _leaf_shapes(x_shape: tuple[int, ...], axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes that parameters and statistics may have: without and with the other axes."""
    features = tuple(x_shape[a] for a in axes)
    return [features, tuple(n if a in axes else 1 for a, n in enumerate(x_shape))]


def _usable(name: str, dtype: Any) -> None:
    if str(dtype) in _UNUSABLE:
        raise TypeError(
            f"{name} must not be of {dtype}, {_UNUSABLE[str(dtype)]}; use float32 or bfloat16, for "
            f"instance."
        )


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


def _known(value: Any) -> float | None:
    """Return a real scalar as a Python number: None if it is traced, nan if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.generic | jax.Array):
        return math.nan
    if isinstance(value, int | float):
        return value
    is_real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    if not is_real or np.ndim(value) > 0:
        return math.nan
    return None if isinstance(value, Tracer) else value.item()
