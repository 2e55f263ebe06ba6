"""Convert and check the leaves of all layouts, under the names they have in jaxbn."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _checks
from jaxbn._checks import PARAMS, STATISTICS

Array = np.ndarray | jax.Array
Params = dict[str, jax.Array]
State = dict[str, jax.Array]

# Haiku and Equinox divide an average by its bias correction, 1 - momentum ** counter. If no count
# is known, this one makes the correction 1, and is small enough to be incremented.
CONVERGED_COUNT = 2**30

_LARGEST_COUNT = np.iinfo(np.int32).max


def array(value: Any) -> Array:
    """Return the values of a PyTorch tensor or of any array, without a copy if possible."""
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            # PyTorch has no NumPy dtype for it, so the bits pass through 16-bit integers.
            return value.view(value.short().dtype).numpy().view(jnp.bfloat16)
        value = value.numpy()
    return np.asarray(value)


def to_jax(value: Array) -> jax.Array:
    """Return a JAX array that shares no memory with a tensor, to which PyTorch may still write."""
    return value if isinstance(value, jax.Array) else jnp.array(value)


def params_and_state(leaves: Mapping[str, Array]) -> tuple[Params, State | None]:
    """Return params and state, given their leaves by name."""
    params = {name: to_jax(leaves[name]) for name in PARAMS if name in leaves}
    state = {name: to_jax(leaves[name]) for name in STATISTICS if name in leaves}
    if "count" in leaves:
        state["count"] = jnp.array(int(leaves["count"]), jnp.int32)
    return params, state or None


def named_leaves(
    params: Mapping[str, Any], state: Mapping[str, Any] | None
) -> tuple[dict[str, Array], list[str]]:
    """Return the leaves of params and state by name, and a list of missing and extra ones."""
    _checks.mapping("params", params)
    if state is not None:
        _checks.mapping("state", state)
    state_names = (*STATISTICS, "count")
    missing = [f"state[{k!r}]" for k in STATISTICS if state is not None and k not in state]
    extra = [f"params[{k!r}]" for k in params if k not in PARAMS]
    extra += [f"state[{k!r}]" for k in state or {} if k not in state_names]
    leaves = {k: array(params[k]) for k in PARAMS if k in params}
    leaves |= {k: array(v) for k, v in (state or {}).items() if k in state_names}
    problems = listed("missing", missing) + listed("extra", extra)
    return leaves, problems


def label(name: str) -> str:
    """Return a leaf as users write it, for error messages."""
    return f"params[{name!r}]" if name in PARAMS else f"state[{name!r}]"


def with_one_axis(leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Reshape leaves with a shape like (1, C, 1, 1) to (C,), and leave others unchanged."""

    def flat(value: Array) -> Array:
        has_one_axis = value.ndim and sum(n != 1 for n in value.shape) <= 1
        return value.reshape(-1) if has_one_axis else value

    return {k: v if k == "count" else flat(v) for k, v in leaves.items()}


def leaf_problems(leaves: Mapping[str, Array], one_axis: bool = True) -> list[str]:
    """Return what is wrong with the dtypes and shapes of leaves, whose keys are users' names."""
    problems = []
    first = next(((k, v.shape) for k, v in leaves.items() if v.ndim == 1 or not one_axis), None)
    for name, value in leaves.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"{name} has dtype {value.dtype}, want a floating one")
        if one_axis and value.ndim != 1:
            problems.append(f"{name} has shape {value.shape}, want (C,)")
        elif first is not None and value.shape != first[1]:
            want = f"{first[1]}, that of {first[0]}"
            problems.append(f"{name} has shape {value.shape}, want {want}")
    return problems


def count_problems(name: str, value: Array) -> list[str]:
    """Return what is wrong with a number of batches."""
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.integer):
        got = f"shape {value.shape} and dtype {value.dtype}"
        return [f"{name} has {got}, want a scalar of an integer dtype"]
    if not 0 <= int(value) <= _LARGEST_COUNT:
        return [f"{name} is {int(value)}, want a number from 0 to {_LARGEST_COUNT}"]
    return []


def all_problems(leaves: Mapping[str, Array], one_axis: bool = True) -> list[str]:
    """Return `leaf_problems` and `count_problems` of the leaves of params and state."""
    problems = leaf_problems({label(k): v for k, v in leaves.items() if k != "count"}, one_axis)
    if "count" in leaves:
        problems += count_problems(label("count"), leaves["count"])
    return problems


def missing_state(framework: str, state: Any) -> list[str]:
    """Return the problem that there is no state, for frameworks whose layers always have one."""
    if state is not None:
        return []
    return [f"state is None, and {framework}'s layer always has running statistics"]


def listed(word: str, names: Iterable[str]) -> list[str]:
    """Return the problem that leaves are missing or extra, if there are any."""
    names = ", ".join(names)
    return [f"{word} {names}"] if names else []


def check_string_keys(name: str, value: Mapping[Any, Any]) -> None:
    other = [key for key in value if not isinstance(key, str)]
    if other:
        raise TypeError(f"{name} must have strings as keys, got {', '.join(map(repr, other[:3]))}.")


def raise_if_any(what: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}.")


def complete_prefix(prefix: str, separator: str) -> str:
    """Return the prefix with the separator at its end, unless it is empty."""
    return prefix if not prefix or prefix.endswith(separator) else prefix + separator
