"""Count, mean and variance of a batch: accurate far from zero, under a mask, across devices."""

import math
from collections.abc import Hashable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

# The name of the moments for policies of `jax.checkpoint`.
NAME = "batch_norm_moments"


def statistics_dtype(*dtypes: DTypeLike) -> jnp.dtype:
    """Float32 at least: half precision neither sums nor averages well."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


class Moments(NamedTuple):
    """What is known of a batch, each of a shape that broadcasts against it.

    The batch's mean is `shift + mean`: a number next to it, and what that number lacks. Kept apart,
    the two say where the mean lies to a fraction of a deviation, however far from zero it is.
    """

    n: jax.Array
    shift: jax.Array
    mean: jax.Array
    var: jax.Array


@jax.custom_jvp
def apart(x: jax.Array, narrow: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    """`x`, converted anew from `narrow`, and `others`, as they are: the identity.

    What two sums share, a conversion or a subtraction, the compiler for CPUs computes once and
    writes out, where each could compute it on its way. A barrier, over different `others` for each,
    keeps them from sharing.
    """
    own, *own_others = lax.optimization_barrier((narrow, *others))
    return own.astype(x.dtype), *own_others


@apart.defjvp
def _apart_jvp(primals, tangents):
    dx, _, *others = tangents
    own = apart(*primals)
    # A barrier gives all that passes it the mapped axes of each, which tangents must have too.
    return own, tuple(d + jnp.zeros_like(v) for d, v in zip((dx, *others), own, strict=True))


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def moments(
    x: jax.Array,
    narrow: jax.Array,
    mask: jax.Array | None,
    axes: tuple[int, ...],
    axis_name: Hashable | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
) -> Moments:
    """Moments of `x` over `axes`, where `mask` is true, and over the devices of `axis_name`.

    `narrow` is `x` before it was converted to the dtype of the statistics. The values are read from
    it, the derivative is with respect to `x`.

    The variance is the biased one. `n` and `shift` have no derivative; those of the others are
    `dmean = E[dx]` and `dvar = 2 E[(x - shift - mean) dx]`, whichever way the values were found.
    """
    own = _moments_on_one_device(x, narrow, mask, axes)
    if axis_name is None:
        return own
    return _pool(_gather(own, axis_name, axis_index_groups))


@moments.defjvp
def _moments_jvp(axes, axis_name, axis_index_groups, primals, tangents):
    x, narrow, mask = primals
    dx, *_ = tangents
    batch = checkpoint_name(moments(x, narrow, mask, axes, axis_name, axis_index_groups), NAME)
    x, shift, mean = apart(x, narrow, batch.shift, batch.mean)
    deviation = x - shift - mean
    if mask is not None:
        deviation = jnp.where(mask, deviation, 0)
        dx = jnp.where(mask, dx, 0)
    sums = jnp.stack([_sum(dx, axes), 2 * _sum(deviation * dx, axes)])
    if axis_name is not None:
        sums = lax.psum(sums, axis_name, axis_index_groups=axis_index_groups)
    dmean, dvar = (total / jnp.maximum(batch.n, 1) for total in sums)
    return batch, Moments(jnp.zeros_like(batch.n), jnp.zeros_like(batch.shift), dmean, dvar)


@partial(jax.jit, static_argnums=3)
def _moments_on_one_device(
    x: jax.Array, narrow: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]
) -> Moments:
    n = _count(x, mask, axes)
    divisor = jnp.maximum(n, 1)

    def is_accurate(batch: Moments) -> jax.Array:
        # Var = E[d^2] - E[d]^2 has at most twice the rounding error of E[d^2].
        return (jnp.abs(batch.mean) <= jnp.sqrt(batch.var)) & (batch.var < jnp.inf)

    def needs_another_pass(passes_and_batch: tuple[jax.Array, Moments]) -> jax.Array:
        passes, batch = passes_and_batch
        return (passes < 3) & ~jnp.all(is_accurate(batch))

    def about_the_mean(passes_and_batch: tuple[jax.Array, Moments]) -> tuple[jax.Array, Moments]:
        passes, batch = passes_and_batch
        shift = jnp.where(is_accurate(batch), batch.shift, batch.shift + batch.mean)
        x1, shift1 = apart(x, narrow, shift)
        mean = _sum(x1 - shift1, axes, mask) / divisor
        # Divided before the sum, which would overflow for deviations that their square does not.
        x2, shift2, _ = apart(x, narrow, shift, mean)
        deviation = x2 - shift2
        mean_square = _sum(deviation * (deviation / divisor), axes, mask)
        var = jnp.maximum(mean_square - jnp.square(mean), 0)
        return passes + 1, Moments(n, shift, mean, var)

    # The first pass, about zero, mostly is enough. A second is about a mean that is right but for
    # rounding, a third about the number nearest to it: of equal values, their value.
    x1, _ = apart(x, narrow, n)
    mean = _sum(x1, axes, mask) / divisor
    x2, _ = apart(x, narrow, mean)
    var = jnp.maximum(_sum(jnp.square(x2), axes, mask) / divisor - jnp.square(mean), 0)
    first = jnp.ones((), jnp.int32), Moments(n, jnp.zeros_like(mean), mean, var)
    _, batch = lax.while_loop(needs_another_pass, about_the_mean, first)

    nearest = batch.shift + batch.mean
    return Moments(n, nearest, (batch.shift - nearest) + batch.mean, batch.var)


def _pool(parts: Moments) -> Moments:
    """Moments of the whole from its parts', stacked on the first axis (Chan et al., 1979)."""
    n = _sum(parts.n, (0,))
    weight = parts.n / jnp.maximum(n, 1)
    shift, mean = jnp.zeros_like(parts.shift[:1]), jnp.zeros_like(parts.mean[:1])
    deviation = parts.mean
    for _ in range(3):
        # As within one part: about zero, about the mean, about the number nearest to it.
        shift = shift + mean
        deviation = (parts.shift - shift) + parts.mean
        mean = _sum(weight * deviation, (0,))
    apart = deviation - mean
    # Weighed before squared, which would overflow for deviations that their square does not.
    var = _sum(weight * parts.var + apart * (weight * apart), (0,))
    return Moments(*(whole[0] for whole in (n, shift, mean, var)))


def _gather(
    own: Moments, axis_name: Hashable, axis_index_groups: Sequence[Sequence[int]] | None
) -> Moments:
    """Every device's moments, stacked on a new first axis, in one collective.

    A sum of tables in which each device fills one row: unlike `all_gather`, `shard_map` knows the
    result to be the same on every device.
    """
    row = jnp.stack(jnp.broadcast_arrays(*own))
    index = lax.axis_index(axis_name)
    if axis_index_groups is not None:
        # The place of a device within its group.
        index = jnp.asarray(np.argsort(np.concatenate(axis_index_groups)))[index]
        index = index % len(axis_index_groups[0])
    size = lax.psum(1, axis_name, axis_index_groups=axis_index_groups)
    is_own = jnp.arange(size).reshape(-1, *[1] * row.ndim) == index
    table = lax.psum(jnp.where(is_own, row, 0), axis_name, axis_index_groups=axis_index_groups)
    return Moments(*jnp.moveaxis(table, 1, 0))


def _count(x: jax.Array, mask: jax.Array | None, axes: tuple[int, ...]) -> jax.Array:
    """The number of values that count."""
    if mask is None:
        values = math.prod(x.shape[a] for a in axes)
        return jnp.full((1,) * x.ndim, values, x.dtype)
    copies = math.prod(x.shape[a] for a in axes if mask.shape[a] != x.shape[a])
    return _sum(mask.astype(x.dtype), axes) * jnp.asarray(copies, x.dtype)


def _sum(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None) -> jax.Array:
    return jnp.sum(x, axes, where=mask, keepdims=True)
