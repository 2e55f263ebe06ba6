"""What all layouts share: arrays of any library, their checks, and our names for them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = np.ndarray | jax.Array
Params = dict[str, jax.Array]
State = dict[str, jax.Array]

PARAMS = ("scale", "bias")
STATISTICS = ("mean", "var")

# Haiku and Equinox divide an average by 1 - momentum ** counter, to take its initial value out.
# Where no count is known, this one makes that a division by 1; and it leaves room to count on.
SETTLED = 2**30

_LARGEST_COUNT = np.iinfo(np.int32).max


def array(value: Any) -> Array:
    """Return the values of a PyTorch tensor or of any array, without a copy if possible."""
    if isinstance(value, jax.Array):
        return value
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            # PyTorch knows no NumPy dtype for it, so the bits pass through 16-bit integers.
            return value.view(value.short().dtype).numpy().view(jnp.bfloat16)
        value = value.numpy()
    return np.asarray(value)


def leaf(value: Array) -> jax.Array:
    """A copy of what is not JAX's: PyTorch goes on writing to the memory of its tensors."""
    return value if isinstance(value, jax.Array) else jnp.array(value)


def split(leaves: Mapping[str, Array]) -> tuple[Params, State | None]:
    """Our params and state, from leaves with our names."""

    params = {name: leaf(leaves[name]) for name in PARAMS if name in leaves}
    state = {name: leaf(leaves[name]) for name in STATISTICS if name in leaves}
    if "count" in leaves:
        state["count"] = jnp.array(int(leaves["count"]), jnp.int32)
    return params, state or None


def join(
    params: Mapping[str, Any], state: Mapping[str, Any] | None
) -> tuple[dict[str, Array], list[str]]:
    """Leaves with our names, from our params and state, and what is wrong with those."""
    mapping("params", params)
    if state is not None:
        mapping("state", state)
    state_names = (*STATISTICS, "count")
    missing = [f"state[{k!r}]" for k in STATISTICS if state is not None and k not in state]
    extra = [f"params[{k!r}]" for k in params if k not in PARAMS]
    extra += [f"state[{k!r}]" for k in state or {} if k not in state_names]
    leaves = {k: array(params[k]) for k in PARAMS if k in params}
    leaves |= {k: array(v) for k, v in (state or {}).items() if k in state_names}
    problems = listed("missing", missing) + listed("extra", extra)
    return leaves, problems


def label(name: str) -> str:
    """How a caller of ours writes a leaf."""
    return f"params[{name!r}]" if name in PARAMS else f"state[{name!r}]"


def flat(leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Leaves of the shape (1, C, 1, 1) as (C,); others as they are."""

    def one_axis(value: Array) -> Array:
        is_flat = value.ndim and sum(n != 1 for n in value.shape) <= 1
        return value.reshape(-1) if is_flat else value

    return {k: v if k == "count" else one_axis(v) for k, v in leaves.items()}


def leaf_problems(leaves: Mapping[str, Array], one_axis: bool = True) -> list[str]:
    """What is wrong with the dtypes and shapes of leaves, by the names that the caller knows."""
    problems = []
    model = next(((k, v.shape) for k, v in leaves.items() if v.ndim == 1 or not one_axis), None)
    for name, value in leaves.items():
        if not jnp.issubdtype(value.dtype, jnp.floating):
            problems.append(f"{name} has dtype {value.dtype}, want a floating one")
        if one_axis and value.ndim != 1:
            problems.append(f"{name} has shape {value.shape}, want (C,)")
        elif model is not None and value.shape != model[1]:
            want = f"{model[1]}, that of {model[0]}"
            problems.append(f"{name} has shape {value.shape}, want {want}")
    return problems


def count_problems(name: str, value: Array) -> list[str]:
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.integer):
        got = f"shape {value.shape} and dtype {value.dtype}"
        return [f"{name} has {got}, want a scalar of an integer dtype"]
    if not 0 <= int(value) <= _LARGEST_COUNT:
        return [f"{name} is {int(value)}, want a number from 0 to {_LARGEST_COUNT}"]
    return []


def our_problems(leaves: Mapping[str, Array], one_axis: bool = True) -> list[str]:
    """`leaf_problems` and `count_problems` for leaves with our names."""
    problems = leaf_problems({label(k): v for k, v in leaves.items() if k != "count"}, one_axis)
    if "count" in leaves:
        problems += count_problems(label("count"), leaves["count"])
    return problems


def no_statistics(framework: str, state: Any) -> list[str]:
    if state is not None:
        return []
    return [f"state is None, and {framework}'s layer always has running statistics"]


def listed(word: str, names: Iterable[str]) -> list[str]:
    names = ", ".join(names)
    return [f"{word} {names}"] if names else []


def mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(value).__name__}.")


def names(name: str, value: Mapping[Any, Any]) -> None:
    """Refuse a mapping with keys that are not strings."""
    other = [key for key in value if not isinstance(key, str)]
    if other:
        raise TypeError(f"{name} must have names as keys, got {', '.join(map(repr, other[:3]))}.")


def refuse(what: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{what}: {'; '.join(problems)}.")


def under(prefix: str, separator: str) -> str:
    """The prefix as it begins a key."""
    return prefix if not prefix or prefix.endswith(separator) else prefix + separator


@jax.jit
def taken_in(momentum: Any, counter: Any) -> jax.Array:
    """The weight that all batches so far have together in an average with that momentum.

    Compiled, so that it rounds as Haiku's and Equinox's own expression does inside `jit`.
    """
    return 1 - momentum**counter
