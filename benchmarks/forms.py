"""Compare ways to write the sums and moments of a batch: their time, and the bytes they write.

The compiler decides how many passes over the batch a form costs. These are forms in use, and
forms that were tried and lost.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import timing
from benchmarks.settings import Settings
from benchmarks.speed import DTYPES, Problem, arrays, copy
from jaxbn import _fusion
from jaxbn._moments import Moments, moments

AXES = (0, 1, 2)
total = partial(jnp.sum, axis=AXES, keepdims=True)


def wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def sums(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    deviation = wide(x) - shift
    return total(deviation), total(jnp.square(deviation))


def separate_sums(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    own_x, own_shift = _fusion.own_reading(x.dtype, wide(x), shift)
    sum_ = total(own_x - own_shift)
    own_x, own_shift, _ = _fusion.own_reading(x.dtype, wide(x), shift, sum_)
    return sum_, total(jnp.square(own_x - own_shift))


def sums_of_examples(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    own_x, own_shift = _fusion.own_reading(x.dtype, wide(x), shift)
    of_examples = jnp.sum(own_x, AXES[1:], keepdims=True) - own_shift * (x.shape[1] * x.shape[2])
    sum_ = jnp.sum(of_examples, 0, keepdims=True)
    own_x, own_shift, _ = _fusion.own_reading(x.dtype, wide(x), shift, sum_)
    return sum_, total(jnp.square(own_x - own_shift))


def sum_of_pairs(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    deviation = wide(x) - shift
    pair = total(lax.complex(deviation, jnp.square(deviation)))
    return pair.real, pair.imag


def reduction_of_two(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    deviation = wide(x) - shift
    zero = jnp.zeros((), deviation.dtype)
    found = lax.reduce(
        *((deviation, jnp.square(deviation)), (zero, zero)),
        lambda one, other: (one[0] + other[0], one[1] + other[1]),
        AXES,
    )
    first, second = (jnp.expand_dims(value, AXES) for value in found)
    return first, second


def moments_of(platform: str, shift: jax.Array | None, x: jax.Array) -> Moments:
    """Return the moments in the form of `platform`, compiled for the backend that runs."""

    def by_platform(*arguments: jax.Array, **forms: Callable[..., Any]) -> Any:
        return forms.get(platform, forms["default"])(*arguments)

    with mock.patch.object(_fusion, "by_platform", by_platform):
        return moments(wide(x), None, shift, x.dtype, AXES)


# Of the batch and a shift of each feature.
FORMS: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "sums about zero": lambda x, s: sums(x, jnp.zeros_like(s)),
    "sums about a shift, as they stand": sums,
    "sums about a shift, separate (in use in the loop of a CPU)": separate_sums,
    "sums of examples, then about a shift, separate (in use on a CPU)": sums_of_examples,
    "sums about a shift, of a complex pair": sum_of_pairs,
    "sums about a shift, a variadic reduce": reduction_of_two,
    "moments in one reading, about a known shift (in use in half precision)": lambda x, s: (
        moments_of("default", s, x)
    ),
    "moments in one reading, about the mean of a sixteenth (in use)": lambda x, s: moments_of(
        "default", None, x
    ),
    "moments in two readings, with the loop (in use on a CPU)": lambda x, s: moments_of(
        "cpu", s, x
    ),
}


def compiled(form: Callable[..., Any], *arguments: jax.Array) -> jax.stages.Compiled:
    # Forget what was traced for the form of another platform.
    jax.clear_caches()
    return jax.jit(form).lower(*arguments).compile()


def measure(settings: Settings) -> dict[str, Any]:
    shape = (4, 14, 14, 64) if settings.quick else (32, 56, 56, 256)
    records = []
    for dtype in settings.track(DTYPES, "forms"):
        given = arrays(Problem(shape, -1, dtype))
        x, shift = given.x, given.mean.reshape(1, 1, 1, -1)
        programs = {name: compiled(form, x, shift) for name, form in FORMS.items()}
        calls: dict[str, Callable[[], Any]] = {
            name: partial(program, x, shift) for name, program in programs.items()
        }
        calls["copy"] = partial(copy, x)
        times = timing.turn_by_turn(calls, seconds=0.3 if settings.quick else 10.0)
        for name, program in programs.items():
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
