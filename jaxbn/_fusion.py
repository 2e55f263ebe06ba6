"""What single compilers need so that they read a batch no more often than they must.

This is the only module that knows of platforms. docs/performance.md counts what each form is for.
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


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def apart(narrow: DTypeLike, x: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """Return `x` and `others`, so that on a CPU a sum over them reads `x` by itself.

    XLA for CPUs gives each sum a loop of its own. What two sums share, such as a conversion or a
    subtraction, it computes once and writes out, where each could compute it on its way. A barrier
    over different `others` for each sum keeps them from sharing. `narrow` is the dtype in which the
    values of `x` came, and are read.
    """

    def barrier(x, *others):
        own, *others = lax.optimization_barrier((x.astype(narrow), *others))
        return own.astype(x.dtype), *others

    return by_platform(x, *others, cpu=barrier, default=lambda *values: values)


@apart.defjvp
def _apart_jvp(narrow, primals, tangents):
    own = apart(narrow, *primals)
    # A barrier gives all that passes it the mapped axes of each, which tangents must have too.
    return own, tuple(d + jnp.zeros_like(v) for d, v in zip(tangents, own, strict=True))


def line(
    narrow: DTypeLike, x: jax.Array, shift: jax.Array, slope: jax.Array, offset: jax.Array
) -> jax.Array:
    """Return `(x - shift) * slope + offset`, whose transpose in slope and offset is two sums.

    XLA for GPUs fuses what comes before the sums of a backward pass, such as the derivative of a
    relu, with a single sum but not with two. There the two are the real and the imaginary part of
    one sum.
    """

    def plain(x, shift, slope, offset):
        return (x - shift) * slope + offset

    def separate(x, shift, slope, offset):
        return plain(*apart(narrow, x, shift), slope, offset)

    def of_one_sum(x, shift, slope, offset):
        both = jnp.broadcast_to(lax.complex(offset, slope), x.shape)
        return (x - shift) * both.imag + both.real

    forms = {"cpu": separate, "cuda": of_one_sum, "rocm": of_one_sum, "default": plain}
    return by_platform(x, shift, slope, offset, **forms)


def until_accurate(first: Any, about: Callable[[jax.Array], Any]) -> Any:
    """Return the moments `first` or, of features where they are inaccurate, those about their mean.

    For CPUs, where each sum reads the batch by itself, and a loop that does not run costs nothing.
    A mean about zero has an error of r roundings, relative to the deviation, where it is r
    deviations from zero: up to four are accepted. A variance about a shift is accepted as in
    `moments`. A third pass is about the number nearest to the mean: of equal values, their value.
    """

    def is_far(distance, var, deviations):
        return ~((jnp.abs(distance) <= deviations * jnp.sqrt(var)) & (var < jnp.inf))

    def needs_another(passes_far_batch):
        passes, far, _ = passes_far_batch
        return (passes < 3) & jnp.any(far)

    def another(passes_far_batch):
        passes, far, batch = passes_far_batch
        new = about(batch.mean_high + batch.mean_low)
        still_far = far & is_far(new.mean_low, new.var, 4)
        # The count is the same, and may have the shape of a single number.
        mended = {
            name: jnp.where(far, getattr(new, name), getattr(batch, name))
            for name in ("mean_high", "mean_low", "var")
        }
        return passes + 1, still_far, batch._replace(**mended)

    far = is_far(first.mean_high, first.var, 4)
    _, _, batch = lax.while_loop(needs_another, another, (jnp.ones((), jnp.int32), far, first))
    return batch


def _varying_alike(*values: jax.Array) -> tuple[jax.Array, ...]:
    """Return values that vary over the same devices where `shard_map` checks, as forms must."""
    varying = [jax.typeof(value).manual_axis_type.varying for value in values]
    everywhere = frozenset().union(*varying)
    return tuple(
        lax.pcast(value, tuple(everywhere - own), to="varying") if everywhere - own else value
        for value, own in zip(values, varying, strict=True)
    )
