"""Ways to write what a batch norm sums and computes: how long each takes, and what it writes out.

The compiler decides how many passes over the batch a form costs. These are the forms that were
tried, the one in use and those that lost, for the next who thinks of one of them.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxbn
from benchmarks import timing
from benchmarks.settings import Settings
from benchmarks.speed import DTYPES, copy
from jaxbn._moments import apart

AXES = (0, 1, 2)
total = partial(jnp.sum, axis=AXES)


def wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def sums_apart(x: jax.Array, shift: jax.Array):
    first, own = apart(wide(x), x, shift)
    sum_ = total(first - own)
    second, own, _ = apart(wide(x), x, shift, sum_)
    return sum_, total(jnp.square(second - own))


def layer(shift: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """The design's plain form: moments about a shift, no derivative of its own."""

    def form(x, shift_):
        del shift_
        s = lax.stop_gradient(shift(wide(x)))
        centered = wide(x) - s
        mean = total(centered) / (x.size // x.shape[-1])
        var = total(jnp.square(centered)) / (x.size // x.shape[-1]) - jnp.square(mean)
        slope = lax.rsqrt(var + 1e-5)
        return (centered * slope - mean * slope).astype(x.dtype)

    return form


def ours(x: jax.Array, shift: jax.Array) -> jax.Array:
    del shift
    params, state = jaxbn.init(x.shape)
    return jaxbn.batch_norm(params, state, x, True)[0]


def and_backward(form: Callable[..., jax.Array]) -> Callable[..., Any]:
    def forward_backward(x, shift):
        y, vjp = jax.vjp(lambda x: form(x, shift), x)
        return y, vjp(x)

    return forward_backward


FORMS: dict[str, Callable[..., Any]] = {
    "sum of x": lambda x, s: total(wide(x)),
    "sums of x and x², as they stand": lambda x, s: (
        total(wide(x)),
        total(jnp.square(wide(x))),
    ),
    "sums of x and x², the square of abs(x)": lambda x, s: (
        total(wide(x)),
        total(jnp.square(wide(jnp.abs(x)))),
    ),
    "sums of x - s and (x - s)², as they stand": lambda x, s: (
        total(wide(x) - s),
        total(jnp.square(wide(x) - s)),
    ),
    "sums of x - s and (x - s)², apart (in use)": sums_apart,
    "layer about 0 (inaccurate)": and_backward(layer(lambda x: jnp.zeros(x.shape[-1:]))),
    "layer about the batch mean": and_backward(layer(lambda x: jnp.mean(x, AXES))),
    "layer about the mean of the first rows": and_backward(layer(lambda x: jnp.mean(x[:1], AXES))),
    "layer in use": and_backward(ours),
}


def measure(settings: Settings) -> dict[str, Any]:
    shape = (4, 14, 14, 64) if settings.quick else (32, 56, 56, 256)
    records = []
    for dtype in settings.track(DTYPES, "forms"):
        x = jax.random.normal(jax.random.key(0), shape, dtype)
        shift = jnp.full(shape[-1:], 0.1)
        compiled = {name: jax.jit(form).lower(x, shift).compile() for name, form in FORMS.items()}
        calls: dict[str, Callable[[], Any]] = {
            name: partial(program, x, shift) for name, program in compiled.items()
        }
        calls["copy"] = partial(copy, x)
        times = timing.turn_by_turn(calls, seconds=0.3 if settings.quick else 10.0)
        for name, program in compiled.items():
            analysis = program.memory_analysis()
            written = None if analysis is None else analysis.temp_size_in_bytes / x.nbytes
            records.append(
                {
                    "dtype": dtype,
                    "form": name,
                    "seconds": statistics.median(times[name]),
                    "over_copy": timing.median_ratio(times[name], times["copy"]),
                    "written_per_input_byte": written,
                }
            )
    return {"shape": list(shape), "cases": records}
