"""What single compilers need to read a batch no more often than they must.

This is the only module that knows of platforms. Whatever the platform, each function computes what
its `default` says; the other forms differ in how XLA compiles them, as docs/performance.md counts.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


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

    return lax.platform_dependent(x, *others, cpu=barrier, default=lambda *values: values)


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
    relu, with a single sum, but not with two. There the two are the real and the imaginary part of
    one sum.
    """

    def of_complex(x, shift, slope, offset):
        both = jnp.broadcast_to(lax.complex(offset, slope), x.shape)
        return both.real + (x - shift) * both.imag

    def plain(x, shift, slope, offset):
        return (x - shift) * slope + offset

    def separate(x, shift, slope, offset):
        return plain(*apart(narrow, x, shift), slope, offset)

    return lax.platform_dependent(
        x, shift, slope, offset,
        cpu=separate, cuda=of_complex, rocm=of_complex, default=plain,
    )
