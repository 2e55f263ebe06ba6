"""Ghost batches, normalized one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import jaxbn

N, SIZE, C = 24, 4, 3
Group = tuple[jax.Array, np.ndarray | None]

OPTIONS = [
    {},
    jaxbn.EXERCISE,
    jaxbn.KERAS,
    {"momentum": None, "running_variance": "biased"},
]


def batch(rng: np.random.Generator, examples: int = N, *, far: float = 0.0) -> jax.Array:
    return jnp.asarray(far + rng.normal(size=(examples, 5, C)) * [1, 3, 0.1])


def params_and_state(rng: np.random.Generator) -> tuple[dict, dict]:
    params = {"scale": jnp.asarray(rng.normal(size=C)), "bias": jnp.asarray(rng.normal(size=C))}
    state = {"mean": jnp.asarray(rng.normal(size=C)), "var": jnp.asarray(rng.uniform(1, 2, C))}
    return params, {**state, "count": jnp.array(3, jnp.int32)}


def parts(x: jax.Array, mask: ArrayLike | None = None, *, size: int = SIZE) -> list[Group]:
    """Cut a batch and its mask into groups of consecutive examples."""
    starts = range(0, len(x), size)
    # Known even while x is traced.
    mask = None if mask is None else np.asarray(mask)
    return [(x[i : i + size], None if mask is None else mask[i : i + size]) for i in starts]


def normalized_alone(
    params: dict, state: dict, groups: list[Group], **options: Any
) -> tuple[list[jax.Array], dict]:
    """Normalize each group as a batch of its own, and track the mean of the groups' statistics.

    The features are on the last axis, and a mask has size 1 there.
    """
    ys, means, variances = [], [], []
    for x, mask in groups:
        # momentum=0 tracks the batch's own statistics.
        own = {**options, "momentum": 0.0, "mask": mask}
        y, new = jaxbn.batch_norm(params, state, x, True, **own)
        ys.append(y)
        n = x[..., 0].size
        if mask is not None:
            n = int(np.broadcast_to(mask, (*x.shape[:-1], 1)).sum())
        means += [new["mean"]] if n >= 1 else []
        variances += [new["var"]] if n >= 2 else []
    momentum = options.get("momentum", 0.9)
    if momentum is None:
        count = int(state["count"])
        momentum = count / (count + 1)
    new = {
        name: momentum * state[name] + (1 - momentum) * sum(found) / len(found)
        for name, found in [("mean", means), ("var", variances)]
    }
    return ys, {**new, "count": state["count"] + 1}


def one_by_one(
    params: dict,
    state: dict,
    x: jax.Array,
    mask: ArrayLike | None = None,
    *,
    size: int = SIZE,
    **options: Any,
) -> tuple[jax.Array, dict]:
    """Return what `batch_norm` returns, found from each group of `size` examples alone."""
    ys, new = normalized_alone(params, state, parts(x, mask, size=size), **options)
    return jnp.concatenate(ys), new
