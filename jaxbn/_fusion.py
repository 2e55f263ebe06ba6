"""Workarounds for single compilers, so that each reads a batch as rarely as possible.

Only this module knows of platforms. docs/performance.md counts what each form is for.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def by_platform(*arguments: jax.Array, **forms: Callable[..., Any]) -> Any:
    """Apply the form for the platform that the program is compiled for, or `default`."""
    return lax.platform_dependent(*_varying_alike(*arguments), **forms)


def by_readings(x: jax.Array, one: Callable[..., Any], separate: Callable[..., Any]) -> Any:
    """Apply `one` where several sums share a reading of `x`, and `separate` where they do not."""
    return by_platform(x, default=one, cpu=separate)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def own_reading(input_dtype: DTypeLike, x: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Return `x` and `others`, so that on a CPU a sum over them reads `x` by itself.

    XLA for CPUs gives each sum a loop of its own. What two sums share, such as a conversion or a
    subtraction, it computes once and writes out, where each could compute it on its way. A barrier
    over different `others` for each sum keeps them from sharing. `input_dtype` is the dtype in
    which the values of `x` came, and are read.
    """

    def barrier(x, *others):
        own, *others = lax.optimization_barrier((x.astype(input_dtype), *others))
        return own.astype(x.dtype), *others

    return by_platform(x, *others, cpu=barrier, default=lambda *values: values)


@own_reading.defjvp
def _own_reading_jvp(input_dtype, primals, tangents):
    own = own_reading(input_dtype, *primals)
    # A barrier gives all that passes it the mapped axes of each, which tangents must have too.
    return own, tuple(d + jnp.zeros_like(v) for d, v in zip(tangents, own, strict=True))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def line(
    input_dtype: DTypeLike, x: jax.Array, shift: jax.Array, slope: jax.Array, offset: jax.Array
) -> jax.Array:
    """Return `(x - shift) * slope + offset`."""
    return (x - shift) * slope + offset


@line.defjvp
def _line_jvp(input_dtype, primals, tangents):
    """The product rule, with the part whose transpose is two sums in the form of the platform."""
    x, shift, slope, _ = primals
    dx, dshift, dslope, doffset = tangents
    summed = _summed_by_transpose(input_dtype, x, shift, dslope, doffset)
    return line(input_dtype, *primals), (dx - dshift) * slope + summed


# Compiled even where the caller is not, which would run its operations one by one.
@partial(jax.jit, static_argnums=0)
def _summed_by_transpose(
    input_dtype: DTypeLike, x: jax.Array, shift: jax.Array, slope: jax.Array, offset: jax.Array
) -> jax.Array:
    """Return `(x - shift) * slope + offset`, whose transpose in slope and offset is two sums.

    XLA for GPUs fuses what comes before the sums of a backward pass, such as the derivative of a
    relu, with a single sum but not with two. There the two are the real and the imaginary part of
    one sum.
    """

    def plain(x, shift, slope, offset):
        return (x - shift) * slope + offset

    def with_own_readings(x, shift, slope, offset):
        own_x, own_shift = own_reading(input_dtype, x, shift)
        return plain(own_x, own_shift, slope, offset)

    def of_one_sum(x, shift, slope, offset):
        both = jnp.broadcast_to(lax.complex(offset, slope), x.shape)
        return (x - shift) * both.imag + both.real

    forms = {
        "cpu": with_own_readings,
        "cuda": of_one_sum,
        "rocm": of_one_sum,
        "default": plain,
    }
    return by_platform(x, shift, slope, offset, **forms)


def _varying_alike(*values: jax.Array) -> tuple[jax.Array, ...]:
    """Return values that vary over the same devices where `shard_map` checks, as forms must."""
    varying = [jax.typeof(value).manual_axis_type.varying for value in values]
    everywhere = frozenset().union(*varying)
    return tuple(
        lax.pcast(value, tuple(everywhere - own), to="varying") if everywhere - own else value
        for value, own in zip(values, varying, strict=True)
    )
