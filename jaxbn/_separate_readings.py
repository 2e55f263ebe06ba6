"""The moments on a CPU, where each sum reads the batch, and a loop that does not run is free."""

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
    """Return the moments about the expected mean or, if that is inaccurate, about a better shift.

    The moments about the expected mean are accurate if it is within one deviation of the mean,
    which at most doubles the error of the sums, and within four deviations of zero, because each
    example is summed about zero. For all other features, a loop sums again about the mean just
    found. The third pass is about the float nearest to the mean, which for equal values is their
    value.
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
        # The count is unchanged, and may have the shape of a scalar.
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
    """Return the moments about a shift that is subtracted from the sum of each example.

    Subtracting it from each value, as `moments_about` does, costs about half a reading more. But
    the sum of an example is about zero, so its rounding error grows with the mean.
    """
    examples, inner = axes[:1], axes[1:]
    n, n_example = count(x, mask, axes), count(x, mask, inner)
    size = jnp.maximum(n, 1)
    own_x, own_shift = _fusion.own_reading(input_dtype, x, shift)
    mean = total(total(own_x, inner, mask) - n_example * own_shift, examples) / size
    own_x, own_shift, _ = _fusion.own_reading(input_dtype, x, shift, mean)
    square = total(jnp.square(own_x - own_shift), axes, mask) / size
    return shifted_moments(n, shift, mean, square)
