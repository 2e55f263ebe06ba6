"""Workarounds for XLA's compilers, so that each of them reads a batch as few times as possible.

Only this module depends on the platform. docs/performance.md has the counts with them.
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
    """Apply `one` if the platform lets several sums share a reading of `x`, else `separate`."""
    return by_platform(x, default=one, cpu=separate)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def own_reading(input_dtype: DTypeLike, x: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Return the arguments unchanged, on a CPU behind a barrier that makes a sum read `x` itself.

    XLA for CPUs gives each sum a loop of its own. If two sums share an operation, such as a
    conversion or a subtraction, it computes the operation once and writes the result to memory,
    although each loop could compute it on the fly. A barrier over different `others` for each sum
    prevents the sharing. The barrier holds `x` in `input_dtype`, the dtype of the input, so that
    this is what is read.
    """

    def barrier(x, *others):
        own, *others = lax.optimization_barrier((x.astype(input_dtype), *others))
        return own.astype(x.dtype), *others

    return by_platform(x, *others, cpu=barrier, default=lambda *values: values)


@own_reading.defjvp
def _own_reading_jvp(input_dtype, primals, tangents):
    own = own_reading(input_dtype, *primals)
    # A barrier gives all its operands the mapped axes of each; tangents must have them too.
    return own, tuple(d + jnp.zeros_like(v) for d, v in zip(tangents, own, strict=True))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def line(
    input_dtype: DTypeLike, x: jax.Array, shift: jax.Array, slope: jax.Array, offset: jax.Array
) -> jax.Array:
    """Return `(x - shift) * slope + offset`."""
    return (x - shift) * slope + offset


@line.defjvp
def _line_jvp(input_dtype, primals, tangents):
    """Apply the product rule; the term whose transpose is two sums depends on the platform."""
    x, shift, slope, _ = primals
    dx, dshift, dslope, doffset = tangents
    summed = _summed_by_transpose(input_dtype, x, shift, dslope, doffset)
    return line(input_dtype, *primals), (dx - dshift) * slope + summed


# Compiled even if the caller is not: one by one, its operations would read the batch more often.
@partial(jax.jit, static_argnums=0)
def _summed_by_transpose(
    input_dtype: DTypeLike, x: jax.Array, shift: jax.Array, slope: jax.Array, offset: jax.Array
) -> jax.Array:
    """Return `(x - shift) * slope + offset`, whose transpose in slope and offset is two sums.

    XLA for GPUs fuses the operations before a sum of the backward pass, such as the derivative of a
    relu, with a single sum but not with two. So there the two sums are the real and the imaginary
    part of one complex sum.
    """

    def plain(x, shift, slope, offset):
        return (x - shift) * _broadcast(slope, x) + _broadcast(offset, x)

    if jnp.iscomplexobj(x):
        return plain(x, shift, slope, offset)

    def with_own_readings(x, shift, slope, offset):
        own_x, own_shift = own_reading(input_dtype, x, shift)
        return plain(own_x, own_shift, slope, offset)

    def of_one_sum(x, shift, slope, offset):
        both = _broadcast(lax.complex(offset, slope), x)
        return (x - shift) * both.imag + both.real

    forms = {
        "cpu": with_own_readings,
        "cuda": of_one_sum,
        "rocm": of_one_sum,
        "default": plain,
    }
    return by_platform(x, shift, slope, offset, **forms)


def _broadcast(value: jax.Array, x: jax.Array) -> jax.Array:
    """Return `value` broadcast to the shape of `x` and to its sharding, if that is explicit.

    Without the sharding, each device would gather the cotangents of the whole batch before the
    transpose sums them. And unlike that of an implicit broadcast, the transpose also sums over axes
    of size one (see `jaxbn._readings.total`).
    """
    sharding = jax.typeof(x).sharding
    is_explicit = any(name is not None for name in sharding.spec)
    return jnp.broadcast_to(value, x.shape, out_sharding=sharding if is_explicit else None)


def _varying_alike(*values: jax.Array) -> tuple[jax.Array, ...]:
    """Make all values vary over the same devices, as `platform_dependent` requires."""
    varying = [jax.typeof(value).manual_axis_type.varying for value in values]
    everywhere = frozenset().union(*varying)
    return tuple(
        lax.pcast(value, tuple(everywhere - own), to="varying") if everywhere - own else value
        for value, own in zip(values, varying, strict=True)
    )
