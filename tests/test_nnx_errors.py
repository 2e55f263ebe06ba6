"""`jaxbn.nnx.BatchNorm` raises errors with exactly these texts."""

import jax
import jax.numpy as jnp
import pytest

import jaxbn
from tests.close import assert_equal
from tests.nnx_layers import ours, stats

CONSTRUCTION = {
    "negative": (-1, {}, ValueError, "num_features must be the size of the feature axis, or a "
                 "sequence with the size of each, got -1 for axis=-1."),
    "float": (3.0, {}, ValueError, "num_features must be the size of the feature axis, or a "
              "sequence with the size of each, got 3.0 for axis=-1."),
    "sizes": (3, {"axis": (1, 2)}, ValueError, "num_features must be the size of the feature axis, "
              "or a sequence with the size of each, got 3 for axis=(1, 2)."),
    "axis": (3, {"axis": None}, ValueError,
             "axis must be an integer or a sequence of them, got None."),
    "boolean axis": (3, {"axis": True}, ValueError,
                     "axis must be an integer or a sequence of them, got True."),
    "repeated axis name": (3, {"axis_name": ("a", "b", "a")}, ValueError,
                           "axis_name must name each mapped axis once, got ('a', 'b', 'a')."),
    "momentum": (3, {"momentum": -1}, ValueError, "momentum must be None or lie in [0, 1], got -1. "
                 "It is the weight of the old value: PyTorch's momentum is one minus it."),
    "epsilon": (3, {"epsilon": -1}, ValueError,
                "epsilon must be a finite number, not negative, got -1."),
    "dtype": (3, {"dtype": jnp.int32}, TypeError, "dtype must be a floating dtype, got int32."),
    "param_dtype": (3, {"param_dtype": jnp.int32}, TypeError,
                    "param_dtype must be a floating dtype, got int32."),
    "batch_variance": (3, {"batch_variance": "fast"}, ValueError,
                       "batch_variance must be 'biased' or 'unbiased', got 'fast'."),
    "running_variance": (3, {"running_variance": None}, ValueError,
                         "running_variance must be 'biased' or 'unbiased', got None."),
    "mode": (3, {"use_running_average": 1}, ValueError,
             "use_running_average must be a Python bool, got 1 of type int."),
}  # fmt: skip


@pytest.mark.parametrize("case", CONSTRUCTION)
def test_errors_of_construction(case):
    num_features, options, kind, text = CONSTRUCTION[case]
    with pytest.raises(kind) as raised:
        ours(num_features, **options)
    assert str(raised.value) == text


CALL = {
    "features": ({}, (8, 4), ValueError, "x of shape (8, 4) has (4,) features on axis=-1, where "
                 "the layer was made for num_features=3."),
    "axis": ({"axis": 2}, (8, 3), ValueError, "axis=2 is out of range for the shape (8, 3): an "
             "axis must lie in [-2, 1]."),
    "one value": (jaxbn.PYTORCH, (1, 3), ValueError, "x of shape (1, 3) has one value per feature "
                  "(axis 1), which has no unbiased variance; give more values, or "
                  "batch_variance='biased' and running_variance='biased'."),
    "axis_name": ({"axis_name": "data"}, (8, 3), ValueError, "axis_name='data' is not bound: call "
                  "batch_norm inside a vmap, pmap or shard_map that names it, or pass "
                  "axis_name=None."),
    "mode": ({"use_running_average": None}, (8, 3), ValueError, "use_running_average must be True "
             "(evaluation) or False (training), got None: give it to BatchNorm or to the call, or "
             "set it with train(), eval() or nnx.view."),
}  # fmt: skip


@pytest.mark.parametrize("case", CALL)
def test_errors_of_a_call(case):
    options, shape, kind, text = CALL[case]
    layer = ours(3, **options)
    before = stats(layer)
    with pytest.raises(kind) as raised:
        layer(jnp.ones(shape))
    assert str(raised.value) == text
    assert_equal(stats(layer), before)


def test_errors_of_wrong_kinds_at_call():
    layer = ours(3)
    with pytest.raises(TypeError, match=r"^mask must be an array of booleans, got complex64\.$"):
        layer(jnp.ones((8, 3)), mask=jnp.ones((8, 3), jnp.complex64))
    with pytest.raises(ValueError, match=r"^use_running_average must be a Python bool, got a trac"):
        jax.jit(layer)(jnp.ones((8, 3)), True)
