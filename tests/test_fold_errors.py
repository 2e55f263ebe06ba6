"""Errors of `fold`."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn.inference import fold
from tests.folding import IN, OUT, lively_norm


class TestFoldErrors:
    GOOD = (jnp.ones((3, 3, IN, OUT)), jnp.ones(OUT), *jaxbn.init((2, OUT)))

    @pytest.mark.parametrize(
        "changes, options, error, message",
        [
            (
                {0: jnp.ones((IN, OUT), int)},
                {},
                TypeError,
                "kernel must be of a floating dtype, got int32; convert it, for instance with "
                "kernel.astype(jnp.float32).",
            ),
            (
                {1: jnp.ones(OUT, int)},
                {},
                TypeError,
                "bias must be an array of a floating dtype, got int32.",
            ),
            (
                {1: jnp.ones(3)},
                {},
                ValueError,
                "bias must have the shape (8,), or one that broadcasts like (1, 8), for the 8 "
                "features on axis 3 of the kernel, which has the shape (3, 3, 4, 8); got (3,). If "
                "its features are on another axis, pass that.",
            ),
            (
                {1: None},
                {"axis": 0},
                ValueError,
                "params['scale'] must have the shape (3,), or one that broadcasts like (1, 3), for "
                "the 3 features on axis 0 of the kernel, which has the shape (3, 3, 4, 8); got "
                "(8,). If its features are on another axis, pass that.",
            ),
            (
                {},
                {"axis": 4},
                ValueError,
                "axis=4 is out of range for the shape (3, 3, 4, 8): an axis must lie in [-4, 3].",
            ),
            (
                {},
                {"axis": (2, 3)},
                ValueError,
                "axis must be a single axis of the kernel, got (2, 3).",
            ),
            (
                {},
                {"epsilon": -1e-5},
                ValueError,
                "epsilon must be a finite number, not negative, got -1e-05.",
            ),
            ({2: None}, {}, TypeError, "params must be a mapping, got NoneType."),
            (
                {2: {"gamma": jnp.ones(OUT)}},
                {},
                ValueError,
                "params may have the keys 'scale' and 'bias'; got ['gamma'].",
            ),
            (
                {2: {"scale": jnp.ones(OUT, int)}},
                {},
                TypeError,
                "params['scale'] must be an array of a floating dtype, got int32.",
            ),
            (
                {3: None},
                {},
                TypeError,
                "state must be a mapping, got NoneType; folding needs the running mean and "
                "variance.",
            ),
            (
                {3: [1]},
                {},
                TypeError,
                "state must be a mapping, got list; folding needs the running mean and variance.",
            ),
            (
                {3: {"mean": jnp.ones(OUT)}},
                {},
                ValueError,
                "state must have the keys 'mean' and 'var', and may have 'count'; got ['mean'].",
            ),
            (
                {3: {"mean": jnp.ones(OUT), "var": [1.0] * OUT}},
                {},
                TypeError,
                "state['var'] must be an array of a floating dtype, got list.",
            ),
            (
                {3: {"mean": jnp.ones((OUT, OUT)), "var": jnp.ones(OUT)}},
                {},
                ValueError,
                "state['mean'] must have the shape (8,), or one that broadcasts like (1, 8), for "
                "the 8 features on axis 3 of the kernel, which has the shape (3, 3, 4, 8); got "
                "(8, 8). If its features are on another axis, pass that.",
            ),
            (
                {0: nn.Partitioned(jnp.ones((IN, OUT)), (None, "model"))},
                {},
                TypeError,
                "kernel must be an array, got Flax's box Partitioned: pass "
                "flax.linen.meta.unbox(kernel), or fold the model's variables with fold_linen.",
            ),
            (
                {1: jnp.ones((IN, 3, OUT))},
                {},
                ValueError,
                "bias must have the shape (8,), or one that broadcasts like (1, 8), for the 8 "
                "features on axis 3 of the kernel, which has the shape (3, 3, 4, 8); got "
                "(4, 3, 8). If its features are on another axis, pass that.",
            ),
            *(
                (
                    {3: {"mean": jnp.ones(OUT), "var": var}},
                    {},
                    ValueError,
                    f"state['var'] must not be negative or NaN, got {text} for feature 2. If "
                    "rounding made it negative, clip it: jnp.maximum(state['var'], 0).",
                )
                for var, text in (
                    (jnp.ones(OUT).at[2].set(-1e-9), "-1e-09"),
                    (np.array([1, 1, -3.5] + [1] * 5)[None], "-3.5"),
                    (jnp.ones((1, OUT), jnp.bfloat16).at[0, 2].set(jnp.nan), "nan"),
                )
            ),
            *(
                (
                    {3: {"mean": jnp.ones(OUT), "var": np.ones(OUT) - np.eye(OUT)[3]}},
                    {"epsilon": epsilon},
                    ValueError,
                    f"state['var'] must be positive where epsilon={epsilon!r}, got 0 for feature "
                    "3, which would be divided by zero. Pass the epsilon of the batch norm.",
                )
                # The second is not a normal number of float32.
                for epsilon in (0.0, 1e-40)
            ),
        ],
    )
    def test_message(self, changes, options, error, message):
        arguments = [changes.get(k, good) for k, good in enumerate(self.GOOD)]
        with pytest.raises(error) as raised:
            fold(*arguments, **options)
        assert str(raised.value) == message


def test_a_variance_of_zero_needs_an_epsilon(x64):
    """A variance of zero is valid, and epsilon may be smaller in float64 than in float32."""
    params, state = lively_norm("float64")
    assert state["var"][2] == 0
    _, bias = fold(jnp.ones((IN, OUT)), None, params, state, epsilon=1e-40)
    expected = params["bias"][2] - 1e20 * params["scale"][2] * state["mean"][2]
    np.testing.assert_allclose(bias[2], expected, rtol=1e-12)


def test_traced_variances_are_not_checked():
    def slope(var, epsilon):
        state = {"mean": jnp.zeros(OUT), "var": var}
        return fold(jnp.ones((IN, OUT)), None, {}, state, epsilon=epsilon)[0][0]

    values = jnp.ones(OUT).at[2].set(-1)
    assert list(np.isnan(jax.jit(slope)(values, 0.0))) == [k == 2 for k in range(OUT)]
    # Only epsilon is traced here.
    with pytest.raises(ValueError, match="negative or NaN, got -1 for feature 2"):
        jax.jit(partial(slope, values))(1e-5)
