"""Arguments that do not fit their call get an error that names them: its shapes, dtype, state."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
from tests.bad_calls import MEAN_VAR, X, assert_refused

# name: (what differs from a good call, the exception, its whole text)
CASES = {
    "params without a zero": (
        {"params": {"scale": np.ones(3, "float8_e8m0fnu")}},
        TypeError,
        "params['scale'] must not be of float8_e8m0fnu, which has neither zero nor negative "
        "values; use float32 or bfloat16, for instance.",
    ),
    "axis too large": (
        {"axis": 2},
        ValueError,
        "axis=2 is out of range for the shape (8, 3): an axis must lie in [-2, 1].",
    ),
    "axis too small": (
        {"axis": (0, -3)},
        ValueError,
        "axis=(0, -3) is out of range for the shape (8, 3): an axis must lie in [-2, 1].",
    ),
    "axis twice": (
        {"axis": (1, -1)},
        ValueError,
        "axis=(1, -1) names an axis of the shape (8, 3) twice.",
    ),
    "params of another size": (
        {"params": {"scale": np.ones(4, np.float32)}},
        ValueError,
        "params['scale'] must have the shape (3,) or (1, 3) of the features of x, which has shape "
        "(8, 3) with features on axis 1; got (4,).",
    ),
    "state of another size": (
        {"state": MEAN_VAR | {"var": np.ones((3, 1), np.float32)}},
        ValueError,
        "state['var'] must have the shape (3,) or (1, 3) of the features of x, which has shape "
        "(8, 3) with features on axis 1; got (3, 1).",
    ),
    "features on several axes": (
        {"axis": (0, 1)},
        ValueError,
        "state['mean'] must have the shape (8, 3) of the features of x, which has shape (8, 3) "
        "with features on axis (0, 1); got (3,). If the features are on axis 1, pass axis=1.",
    ),
    "features first": (
        {"x": np.zeros((2, 3, 4, 5), np.float32)},
        ValueError,
        "state['mean'] must have the shape (5,) or (1, 1, 1, 5) of the features of x, which has "
        "shape (2, 3, 4, 5) with features on axis 3; got (3,). If the features are on axis 1, pass "
        "axis=1.",
    ),
    "features first, in params that broadcast": (
        {
            "x": np.zeros((2, 4, 4, 3), np.float32),
            "axis": 1,
            "params": {"scale": np.ones((1, 1, 1, 3), np.float32)},
        },
        ValueError,
        "params['scale'] must have the shape (4,) or (1, 4, 1, 1) of the features of x, which has "
        "shape (2, 4, 4, 3) with features on axis 1; got (1, 1, 1, 3). If the features are on axis "
        "3, pass axis=3.",
    ),
    "features on either of two axes": (
        {"x": np.zeros((3, 3, 4, 5), np.float32)},
        ValueError,
        "state['mean'] must have the shape (5,) or (1, 1, 1, 5) of the features of x, which has "
        "shape (3, 3, 4, 5) with features on axis 3; got (3,).",
    ),
    "integer params": (
        {"params": {"bias": np.ones(3, np.int32)}},
        TypeError,
        "params['bias'] must be an array of a floating dtype, got int32.",
    ),
    "params of lists": (
        {"params": {"bias": [1.0, 2.0, 3.0]}},
        TypeError,
        "params['bias'] must be an array of a floating dtype, got list.",
    ),
    "unknown params": (
        {"params": {"weight": np.ones(3, np.float32)}},
        ValueError,
        "params may have the keys 'scale' and 'bias'; got ['weight'].",
    ),
    "params are not a mapping": (
        {"params": None},
        TypeError,
        "params must be a mapping, got NoneType; without scale and bias it is {}.",
    ),
    "state is not a mapping": (
        {"state": (0.0, 1.0)},
        TypeError,
        "state must be a mapping, got tuple; without statistics it is None.",
    ),
    "unknown state": (
        {"state": MEAN_VAR | {"average": 1}},
        ValueError,
        "state must have the keys 'mean' and 'var', and may have 'count'; "
        "got ['average', 'mean', 'var'].",
    ),
    "missing state": (
        {"state": {"mean": np.zeros(3, np.float32)}},
        ValueError,
        "state must have the keys 'mean' and 'var', and may have 'count'; got ['mean'].",
    ),
    "count per feature": (
        {"state": MEAN_VAR | {"count": np.zeros(3, np.int32)}},
        ValueError,
        "state['count'] must be a scalar, got one of shape (3,).",
    ),
    "count that is no integer": (
        {"state": MEAN_VAR | {"count": np.float32(1)}},
        TypeError,
        "state['count'] must be a scalar array of an integer dtype of at least 32 bits, such as "
        "int32, got float32.",
    ),
    "count that is no array": (
        {"state": MEAN_VAR | {"count": 1}},
        TypeError,
        "state['count'] must be a scalar array of an integer dtype of at least 32 bits, such as "
        "int32, got int.",
    ),
    **{
        f"count that wraps, {dtype}": (
            {"state": MEAN_VAR | {"count": jnp.zeros((), dtype)}},
            TypeError,
            "state['count'] must be a scalar array of an integer dtype of at least 32 bits, such "
            f"as int32, got {dtype}.",
        )
        for dtype in ("int4", "int8", "uint8", "int16", "uint16")
    },
    "cumulative without a count": (
        {"momentum": None},
        ValueError,
        "momentum=None, the cumulative average, needs the number of batches so far: state must "
        "have 'count', as init(..., track_count=True) makes it.",
    ),
    "epsilon that is infinite in float32": (
        {"epsilon": 1e300},
        ValueError,
        "epsilon must be at most 3.4e+38, the largest finite number of float32, got 1e+300.",
    ),
    "epsilon that is infinite in float32, in evaluation": (
        {"epsilon": np.float64(1e300), "train": False},
        ValueError,
        "epsilon must be at most 3.4e+38, the largest finite number of float32, got "
        "np.float64(1e+300).",
    ),
    "no epsilon in training": (
        {"epsilon": 0.0},
        ValueError,
        "epsilon must be at least 1.2e-38, the smallest normal number of float32, where the "
        "batch's own statistics normalize, got 0.0: a feature that is constant in a batch would "
        "be divided by zero.",
    ),
    "no epsilon without a state": (
        {"epsilon": 0, "state": None, "train": False},
        ValueError,
        "epsilon must be at least 1.2e-38, the smallest normal number of float32, where the "
        "batch's own statistics normalize, got 0: a feature that is constant in a batch would "
        "be divided by zero.",
    ),
    "epsilon that is zero in float32": (
        {"epsilon": 1e-50},
        ValueError,
        "epsilon must be at least 1.2e-38, the smallest normal number of float32, where the "
        "batch's own statistics normalize, got 1e-50: a feature that is constant in a batch would "
        "be divided by zero.",
    ),
    "mask of numbers": (
        {"mask": np.ones((8, 3), np.float32)},
        TypeError,
        "mask must be an array of booleans, got float32.",
    ),
    "mask of a list": (
        {"mask": [True] * 3},
        TypeError,
        "mask must be an array of booleans, got list.",
    ),
    "mask that does not broadcast": (
        {"mask": np.ones((8,), bool)},
        ValueError,
        "mask of shape (8,) does not broadcast against x of shape (8, 3).",
    ),
    "mask of more axes": (
        {"mask": np.ones((1, 8, 3), bool)},
        ValueError,
        "mask of shape (1, 8, 3) does not broadcast against x of shape (8, 3).",
    ),
    "mask larger than x": (
        {"x": np.zeros((1, 3), np.float32), "mask": np.ones((8, 3), bool)},
        ValueError,
        "mask of shape (8, 3) does not broadcast against x of shape (1, 3).",
    ),
    "unbound axis name": (
        {"axis_name": "batch"},
        ValueError,
        "axis_name='batch' is not bound: call batch_norm inside a vmap, pmap or shard_map that "
        "names it, or pass axis_name=None.",
    ),
    "one value per feature": (
        {"x": np.zeros((1, 3), np.float32)},
        ValueError,
        "x of shape (1, 3) has one value per feature (axis 1), which has no unbiased variance; "
        "give more values, or batch_variance='biased' and running_variance='biased'.",
    ),
    "one value per feature, unbiased in the batch alone": (
        {
            "x": np.zeros((1, 1, 3), np.float32),
            "batch_variance": "unbiased",
            "running_variance": "biased",
        },
        ValueError,
        "x of shape (1, 1, 3) has one value per feature (axis 2), which has no unbiased variance; "
        "give more values, or batch_variance='biased' and running_variance='biased'.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_batch_norm(name):
    assert_refused(*CASES[name])


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
@pytest.mark.usefixtures("x64")
def test_counts_that_do_not_wrap(dtype):
    state = MEAN_VAR | {"count": jnp.zeros((), dtype)}
    _, new = jaxbn.batch_norm({}, state, X, True)
    assert new["count"] == 1 and new["count"].dtype == dtype


@pytest.mark.usefixtures("x64")
def test_an_epsilon_that_is_finite_in_float64():
    x = np.array([[-1e150], [1e150]])
    y, _ = jaxbn.batch_norm({}, None, x, True, epsilon=3e300)
    np.testing.assert_allclose(y, [[-0.5], [0.5]], rtol=1e-12)
