"""Check arguments by themselves. Errors name the argument, what was passed and what is expected."""

import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

# The keys of params and of state, which may also have a `count`.
PARAMS, STATISTICS = ("scale", "bias"), ("mean", "var")

# Floating dtypes that no batch norm can be computed with, and why.
_UNUSABLE = {
    "float8_e8m0fnu": "which has neither zero nor negative values",
    "float6_e2m3fn": "which XLA does not compute with",
    "float6_e3m2fn": "which XLA does not compute with",
}


def floating_array(name: str, value: ArrayLike) -> jax.Array:
    real(name, value)
    return inexact_array(name, value)


def real(name: str, value: Any) -> None:
    dtype = getattr(value, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind == "c":
        raise TypeError(f"{name} must be of a real floating dtype, got {dtype}.")


def inexact_array(name: str, value: ArrayLike) -> jax.Array:
    """Return an array of real or complex floating numbers."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"{name} must be an array of a floating dtype, got {value!r} of type "
            f"{type(value).__name__}."
        )
    try:
        is_inexact = jnp.issubdtype(dtype, jnp.inexact)
    except TypeError:
        raise TypeError(
            f"{name} must be an array of NumPy or JAX, got a {type(value).__module__}."
            f"{type(value).__name__}."
        ) from None
    if not is_inexact:
        raise TypeError(
            f"{name} must be of a floating dtype, got {dtype}; convert it, for instance with "
            f"{name}.astype(jnp.float32)."
        )
    _usable(name, dtype)
    if np.ndim(value) == 0:
        raise ValueError(f"{name} must have at least one axis, for the features; got a scalar.")
    return jnp.asarray(value)


def floating_leaf(name: str, leaf: Any, kind: type = jnp.floating) -> None:
    """Check the dtype of a parameter or a statistic, which for `jnp.inexact` may be complex."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, kind):
        got = type(leaf).__name__ if dtype is None else dtype
        raise TypeError(f"{name} must be an array of a floating dtype, got {got}.")
    _usable(name, dtype)


def inexact_dtype(name: str, dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype of real or complex floating numbers."""
    if isinstance(dtype, jax.Array | np.ndarray):
        raise TypeError(f"{name} must be a floating dtype, got an array of {dtype.dtype}.")
    try:
        result = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name} must be a floating dtype, got {dtype!r}.") from None
    if not jnp.issubdtype(result, jnp.inexact):
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


def function(name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {value!r}.")


def mapping(
    name: str,
    value: Any,
    required: Sequence[str] = (),
    *,
    optional: Sequence[str] | None = None,
    advice: str = "",
) -> None:
    """Check that a value is a mapping and, with `optional`, that it has only the right keys."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(value).__name__}{advice}.")
    if optional is None or set(required) <= value.keys() <= {*required, *optional}:
        return
    must, may = (" and ".join(map(repr, keys)) for keys in (required, optional))
    wanted = f"must have the keys {must}, and may have" if required else "may have the keys"
    raise ValueError(f"{name} {wanted} {may}; got {sorted(map(str, value))}.")


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


def axis(axis: int | Sequence[int]) -> tuple[int, ...]:
    """Return the axes as they are given, one or more, before any shape is known."""
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not given or not all(
        isinstance(a, int | np.integer) and not isinstance(a, bool) for a in given
    ):
        raise ValueError(f"axis must be an integer or a sequence of them, got {axis!r}.")
    return given


def momentum(momentum: Any) -> None:
    known = None if momentum is None else known_number(momentum)
    if known is not None and not 0 <= known <= 1:
        raise ValueError(
            f"momentum must be None or lie in [0, 1], got {momentum!r}. It is the weight of the "
            f"old value: PyTorch's momentum is one minus it."
        )


def epsilon(epsilon: Any) -> None:
    known = known_number(epsilon)
    if known is not None and not 0 <= known < math.inf:
        raise ValueError(f"epsilon must be a finite number, not negative, got {epsilon!r}.")


def renorm_limit(name: str, value: Any, least: int) -> None:
    """Check a limit of batch renormalization, which may be infinite."""
    known = known_number(value)
    is_scalar = np.ndim(value) == 0 if known is None else known >= least
    if not is_scalar:
        advice = " Batch renormalization needs both r_max and d_max." if value is None else ""
        raise ValueError(f"{name} must be a number of at least {least}, got {value!r}.{advice}")


def estimator(name: str, value: Any) -> None:
    if value not in ("biased", "unbiased"):
        raise ValueError(f"{name} must be 'biased' or 'unbiased', got {value!r}.")


def virtual_batch_size(size: Any) -> None:
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise ValueError(f"virtual_batch_size must be None or a positive integer, got {size!r}.")


def axis_name(axis_name: Hashable | Sequence[Hashable] | None) -> None:
    """Check that `axis_name` can name mapped axes, whether or not it is bound."""
    if axis_name is None:
        return
    names = names_of(axis_name)
    if not names or not all(isinstance(n, Hashable) and not isinstance(n, int) for n in names):
        raise ValueError(
            f"axis_name must be the name of a mapped axis, a tuple of them, or None, got "
            f"{axis_name!r}."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"axis_name must name each mapped axis once, got {axis_name!r}.")


def names_of(axis_name: Hashable | Sequence[Hashable]) -> Sequence[Hashable]:
    """Return the names that `axis_name` holds, one or several."""
    return axis_name if isinstance(axis_name, list | tuple) else (axis_name,)


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


def known_number(value: Any) -> float | None:
    """Return a real scalar as a Python number: None if it is traced, nan if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.generic | jax.Array):
        return math.nan
    if isinstance(value, int | float):
        return value
    is_real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    if not is_real or np.ndim(value) > 0:
        return math.nan
    return None if isinstance(value, Tracer) else value.item()


def _usable(name: str, dtype: Any) -> None:
    if str(dtype) in _UNUSABLE:
        raise TypeError(
            f"{name} must not be of {dtype}, {_UNUSABLE[str(dtype)]}; use float32 or bfloat16, for "
            f"instance."
        )
