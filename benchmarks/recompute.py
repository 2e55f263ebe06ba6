"""Measure memory and time of a chain of convolution → batch norm → relu blocks by what is kept.

`jax.checkpoint` always keeps what goes into the function it wraps; its policy says, by name, what
else is kept for the backward pass. The rest is computed again. The blocks run under `lax.scan`, as
those of deep networks do: if they were written out one after another, XLA on the CPU would find
that a value is computed twice, and keep it.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxbn
from benchmarks import timing
from benchmarks.settings import Settings
from benchmarks.speed import DTYPES

Wrap = Callable[[Callable], Callable]
keep_names = jax.checkpoint_policies.save_only_these_names
keep_moments = partial(jax.checkpoint, policy=keep_names("batch_norm_moments"))
keep_products = partial(jax.checkpoint, policy=keep_names("convolution", "batch_norm_moments"))


def convolve(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Return a 1 x 1 convolution, a matrix product: others are slow under `scan` on a CPU."""
    return checkpoint_name(x @ kernel, "convolution")


def normalize(params: Any, state: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    y, state = jaxbn.batch_norm(params, state, x, train=True)
    return jax.nn.relu(y), state


def cut_before_the_convolution(wrap: Wrap, weights: Any, states: Any, x: jax.Array) -> Any:
    """Checkpoint blocks of convolution → batch norm → relu."""

    @wrap
    def block(x, weights_and_state):
        (kernel, params), state = weights_and_state
        return normalize(params, state, convolve(kernel, x))

    return lax.scan(block, x, (weights, states))


def cut_after_the_convolution(wrap: Wrap, weights: Any, states: Any, x: jax.Array) -> Any:
    """Checkpoint batch norm → relu → the next convolution: the same chain, cut elsewhere."""

    @wrap
    def block(x, weights_and_state):
        params, state, next_kernel = weights_and_state
        x, state = normalize(params, state, x)
        return convolve(next_kernel, x), state

    kernels, params = weights
    *heads, (last_params, last_state) = (
        jax.tree.map(lambda v: v[:-1], params),
        jax.tree.map(lambda v: v[:-1], states),
        jax.tree.map(lambda v: v[-1], (params, states)),
    )
    x, new = lax.scan(block, convolve(kernels[0], x), (*heads, kernels[1:]))
    x, state = normalize(last_params, last_state, x)
    return x, jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), new, state)


CHAINS: dict[str, Callable[..., Any]] = {
    "all (no checkpoint)": partial(cut_before_the_convolution, lambda block: block),
    "convolution → norm → relu: input, convolution, moments": partial(
        cut_before_the_convolution, keep_products
    ),
    "norm → relu → convolution: input, moments": partial(cut_after_the_convolution, keep_moments),
    "norm → relu → convolution: input": partial(cut_after_the_convolution, jax.checkpoint),
}


def training_step(chain: Callable[..., Any]) -> Any:
    """Return `step(weights, states, x) -> (gradients, states)`."""

    def loss(weights, states, x):
        y, states = chain(weights, states, x)
        return jnp.mean(jnp.square(y.astype(jnp.float32))), states

    return jax.jit(jax.grad(loss, has_aux=True))


def arguments(shape: tuple[int, ...], blocks: int, dtype: str) -> tuple[Any, Any, jax.Array]:
    """Return weights and states, stacked over the blocks, and the input."""
    features = shape[-1]
    of_kernels, of_x = jax.random.split(jax.random.key(0))
    he = jax.nn.initializers.he_normal(batch_axis=0)
    kernels = he(of_kernels, (blocks, features, features), dtype)
    params, states = jax.tree.map(lambda v: jnp.stack([v] * blocks), jaxbn.init(shape))
    return (kernels, params), states, jax.random.normal(of_x, shape, dtype)


def measure(settings: Settings) -> dict[str, Any]:
    shape, blocks = ((4, 8, 8, 8), 2) if settings.quick else ((32, 28, 28, 128), 8)
    records = []
    for dtype in settings.track(DTYPES, "recompute"):
        given = arguments(shape, blocks, dtype)
        steps = {name: training_step(chain) for name, chain in CHAINS.items()}
        times = timing.turn_by_turn(
            {name: partial(step, *given) for name, step in steps.items()},
            seconds=0.3 if settings.quick else 20.0,
        )
        plain = times[next(iter(CHAINS))]
        for name, step in steps.items():
            analysis = step.lower(*given).compile().memory_analysis()
            records.append(
                {
                    "dtype": dtype,
                    "kept": name,
                    "temporary_bytes": None if analysis is None else analysis.temp_size_in_bytes,
                    "seconds": statistics.median(times[name]),
                    "over_all": timing.median_ratio(times[name], plain),
                }
            )
    return {"shape": list(shape), "blocks": blocks, "cases": records}
