"""The moments where each sum reads the batch by itself, and a loop that does not run is free."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxbn import _fusion
from jaxbn._readings import ShiftedMoments, count, moments_about, shifted_moments, total


def moments_in_separate_readings(
    x: jax.Array,
    mask: jax.Array | None,
    expected: jax.Array,
    input_dtype: DTypeLike,
    axes: tuple[int, ...],
) -> ShiftedMoments:
    """Return the moments about the mean that is expected or, where that is inaccurate, another.

    They are accurate where the shift is within one deviation of the mean, which at most doubles the
    error of the sums, and within four deviations of zero, about which examples are summed at first.
    Elsewhere a loop sums again, about the mean just found. A third pass is about the number nearest
    to the mean: for equal values, their value.
    """
    about = partial(moments_about, x=x, mask=mask, input_dtype=input_dtype, axes=axes)

    def is_far(distance, var, deviations):
        return ~((jnp.abs(distance) <= deviations * jnp.sqrt(var)) & (var < jnp.inf))

    def needs_another(carry):
        passes, far, _ = carry
        return (passes < 3) & jnp.any(far)

    def another(carry):
        passes, far, old = carry
        mean = old.shift + old.mean
        new = about(jnp.where(jnp.isfinite(mean), mean, 0))
        # The count is the same, and may have the shape of a single number.
        updated = ShiftedMoments(
            old.n, *(jnp.where(far, a, b) for a, b in zip(new[1:], old[1:], strict=True))
        )
        return passes + 1, far & is_far(new.mean, new.var, 1), updated

    first = _sums_of_examples(expected, x, mask, input_dtype, axes)
    far = is_far(first.mean, first.var, 1) | is_far(first.shift, first.var, 4)
    return lax.while_loop(needs_another, another, (jnp.ones((), jnp.int32), far, first))[-1]


def _sums_of_examples(
    shift: jax.Array,
    x: jax.Array,
    mask: jax.Array | None,
    input_dtype: DTypeLike,
    axes: tuple[int, ...],
) -> ShiftedMoments:
    """Return the moments about a shift, which is subtracted from the sum of each example.

    This is faster than `moments_about`: subtracting before adding costs about half a reading. An
    example is summed about zero, so its sum is rounded at its own size.
    """
    examples, inner = axes[:1], axes[1:]
    n, n_example = count(x, mask, axes), count(x, mask, inner)
    size = jnp.maximum(n, 1)
    own_x, own_shift = _fusion.own_reading(input_dtype, x, shift)
    mean = total(total(own_x, inner, mask) - n_example * own_shift, examples) / size
    own_x, own_shift, _ = _fusion.own_reading(input_dtype, x, shift, mean)
    square = total(jnp.square(own_x - own_shift), axes, mask) / size
    return shifted_moments(n, shift, mean, square)
