"""Every bad input gets an error that names the argument, what came and what is wanted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen
from tests.bad_calls import MEAN_VAR, X, assert_refused

# dtypes that JAX has and that nothing can be normalized in
UNUSABLE = {
    "float8_e8m0fnu": "which has neither zero nor negative values",
    "float6_e2m3fn": "which XLA does not compute with",
    "float6_e3m2fn": "which XLA does not compute with",
}

# name: (what differs from a good call, the exception, its whole text)
CASES = {
    "integer input": (
        {"x": np.zeros((8, 3), np.int32)},
        TypeError,
        "x must be of a floating dtype, got int32; convert it, for instance with "
        "x.astype(jnp.float32).",
    ),
    "boolean input": (
        {"x": np.zeros((8, 3), bool)},
        TypeError,
        "x must be of a floating dtype, got bool; convert it, for instance with "
        "x.astype(jnp.float32).",
    ),
    **{
        f"input of {dtype}": (
            {"x": np.ones((8, 3), dtype)},
            TypeError,
            f"x must not be of {dtype}, {reason}; use float32 or bfloat16, for instance.",
        )
        for dtype, reason in UNUSABLE.items()
    },
    "output without a zero": (
        {"dtype": jnp.float8_e8m0fnu},
        TypeError,
        "dtype must not be of float8_e8m0fnu, which has neither zero nor negative values; use "
        "float32 or bfloat16, for instance.",
    ),
    "list": (
        {"x": [[1.0], [2.0]]},
        TypeError,
        "x must be an array of a floating dtype, got [[1.0], [2.0]] of type list.",
    ),
    "scalar": (
        {"x": np.float32(1)},
        ValueError,
        "x must have at least one axis, for the features; got a scalar.",
    ),
    "no axis": (
        {"axis": ()},
        ValueError,
        "axis must be an integer or a sequence of them, got ().",
    ),
    "axis a boolean": (
        {"axis": True},
        ValueError,
        "axis must be an integer or a sequence of them, got True.",
    ),
    "axis of booleans": (
        {"axis": (0, False)},
        ValueError,
        "axis must be an integer or a sequence of them, got (0, False).",
    ),
    "fractional axis": (
        {"axis": 1.0},
        ValueError,
        "axis must be an integer or a sequence of them, got 1.0.",
    ),
    "negative momentum": (
        {"momentum": -0.1},
        ValueError,
        "momentum must be None or lie in [0, 1], got -0.1. It is the weight of the old value: "
        "PyTorch's momentum is one minus it.",
    ),
    "momentum above one": (
        {"momentum": 1.5, "train": False},
        ValueError,
        "momentum must be None or lie in [0, 1], got 1.5. It is the weight of the old value: "
        "PyTorch's momentum is one minus it.",
    ),
    "momentum not a number": (
        {"momentum": float("nan")},
        ValueError,
        "momentum must be None or lie in [0, 1], got nan. It is the weight of the old value: "
        "PyTorch's momentum is one minus it.",
    ),
    "momentum not a number of NumPy": (
        {"momentum": np.float32("nan")},
        ValueError,
        "momentum must be None or lie in [0, 1], got np.float32(nan). It is the weight of the old "
        "value: PyTorch's momentum is one minus it.",
    ),
    "momentum larger than any float": (
        {"momentum": 10**400},
        ValueError,
        f"momentum must be None or lie in [0, 1], got {10**400}. It is the weight of the old "
        "value: PyTorch's momentum is one minus it.",
    ),
    "momentum a boolean": (
        {"momentum": True},
        ValueError,
        "momentum must be None or lie in [0, 1], got True. It is the weight of the old value: "
        "PyTorch's momentum is one minus it.",
    ),
    "momentum per feature": (
        {"momentum": np.array([0.5, 0.5, 0.5])},
        ValueError,
        "momentum must be None or lie in [0, 1], got array([0.5, 0.5, 0.5]). It is the weight of "
        "the old value: PyTorch's momentum is one minus it.",
    ),
    "momentum a string": (
        {"momentum": "0.9"},
        ValueError,
        "momentum must be None or lie in [0, 1], got '0.9'. It is the weight of the old value: "
        "PyTorch's momentum is one minus it.",
    ),
    "negative epsilon": (
        {"epsilon": -1e-5, "train": False},
        ValueError,
        "epsilon must be a finite number, not negative, got -1e-05.",
    ),
    "infinite epsilon": (
        {"epsilon": float("inf")},
        ValueError,
        "epsilon must be a finite number, not negative, got inf.",
    ),
    "epsilon larger than any float": (
        {"epsilon": 10**400},
        ValueError,
        f"epsilon must be at most 3.4e+38, the largest finite number of float32, got {10**400}.",
    ),
    "epsilon not a number": (
        {"epsilon": float("nan")},
        ValueError,
        "epsilon must be a finite number, not negative, got nan.",
    ),
    "complex epsilon": (
        {"epsilon": 1j},
        ValueError,
        "epsilon must be a finite number, not negative, got 1j.",
    ),
    "unknown batch_variance": (
        {"batch_variance": "sample"},
        ValueError,
        "batch_variance must be 'biased' or 'unbiased', got 'sample'.",
    ),
    "unknown running_variance": (
        {"running_variance": True},
        ValueError,
        "running_variance must be 'biased' or 'unbiased', got True.",
    ),
    "integer dtype": (
        {"dtype": jnp.int32},
        TypeError,
        "dtype must be a floating dtype, got int32.",
    ),
    "dtype that is none": (
        {"dtype": "float17"},
        TypeError,
        "dtype must be a floating dtype, got 'float17'.",
    ),
    "train is a number": (
        {"train": 1},
        ValueError,
        "train must be a Python bool, got 1 of type int.",
    ),
    "groups without an axis name": (
        {"axis_index_groups": [[0, 1]]},
        ValueError,
        "axis_index_groups=[[0, 1]] are groups of an axis: axis_name must name it, got None.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_batch_norm(name):
    assert_refused(*CASES[name])


def test_traced_train():
    with pytest.raises(ValueError) as caught:
        jax.jit(lambda train: jaxbn.batch_norm({}, MEAN_VAR, X, train)[0])(True)
    assert str(caught.value) == (
        "train must be a Python bool, got a traced bool[]; make it a static argument of jit, or "
        "branch with lax.cond over two calls."
    )


def test_linen_traced_use_running_average():
    layer = jaxbn.linen.BatchNorm()
    variables = layer.init(jax.random.key(0), X, True)
    with pytest.raises(ValueError) as caught:
        jax.jit(lambda flag: layer.apply(variables, X, flag))(True)
    assert str(caught.value) == (
        "use_running_average must be a Python bool, got a traced bool[]; make it a static argument "
        "of jit, or branch with lax.cond over two calls."
    )


def test_traced_momentum_per_feature():
    with pytest.raises(ValueError, match="momentum must be None or lie in"):
        jax.jit(lambda m: jaxbn.batch_norm({}, MEAN_VAR, X, True, momentum=m)[0])(np.ones(3))


def test_linen_refuses_an_unknown_estimator_when_it_initializes():
    with pytest.raises(ValueError) as caught:
        jaxbn.linen.BatchNorm(running_variance="sample").init(jax.random.key(0), X, False)  # type: ignore[arg-type]
    assert str(caught.value) == "running_variance must be 'biased' or 'unbiased', got 'sample'."


@pytest.mark.parametrize(
    ("arguments", "exception", "text"),
    [
        (
            {"shape": ()},
            ValueError,
            "shape must be the input's shape, a non-empty sequence of sizes, got ().",
        ),
        (
            {"shape": 3},
            ValueError,
            "shape must be the input's shape, a non-empty sequence of sizes, got 3.",
        ),
        (
            {"shape": (4, -1)},
            ValueError,
            "shape must be the input's shape, a non-empty sequence of sizes, got (4, -1).",
        ),
        (
            {"shape": (4, None)},
            ValueError,
            "shape must be the input's shape, a non-empty sequence of sizes, got (4, None).",
        ),
        (
            {"shape": (4, 3), "axis": 2},
            ValueError,
            "axis=2 is out of range for the shape (4, 3): an axis must lie in [-2, 1].",
        ),
        (
            {"shape": (4, 3), "param_dtype": "float8_e8m0fnu"},
            TypeError,
            "param_dtype must not be of float8_e8m0fnu, which has neither zero nor negative "
            "values; use float32 or bfloat16, for instance.",
        ),
        (
            {"shape": (4, 3), "param_dtype": jnp.int8},
            TypeError,
            "param_dtype must be a floating dtype, got int8.",
        ),
    ],
)
def test_init(arguments, exception, text):
    with pytest.raises(exception) as caught:
        jaxbn.init(**arguments)
    assert str(caught.value) == text


def test_an_array_is_no_dtype():
    with pytest.raises(TypeError) as caught:
        jaxbn.batch_norm({}, None, X, True, dtype=X)
    assert str(caught.value) == "dtype must be a floating dtype, got an array of float32."


def test_a_tensor_of_another_library_is_no_array():
    class Tensor:
        dtype, shape = object(), (8, 3)

    with pytest.raises(TypeError) as caught:
        jaxbn.batch_norm({}, None, Tensor(), True)
    assert str(caught.value) == f"x must be an array of NumPy or JAX, got a {__name__}.Tensor."
