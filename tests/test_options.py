"""The options of a batch norm: listed once, and checked before any training step."""

import inspect

import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._options import Options
from tests.raises import raises

FEATURES = 3
LAYERS = {"linen": jaxbn.linen.BatchNorm, "nnx": jaxbn.nnx.BatchNorm}

MOMENTUM = "It is the weight of the old value: PyTorch's momentum is one minus it."
# Values that no input makes valid, with the error and its text.
BAD = {
    "use_running_average": [
        ("yes", ValueError, "use_running_average must be a Python bool, got 'yes' of type str."),
    ],
    "axis": [
        (1.5, ValueError, "axis must be an integer or a sequence of them, got 1.5."),
        (True, ValueError, "axis must be an integer or a sequence of them, got True."),
    ],
    "momentum": [(2, ValueError, f"momentum must be None or lie in [0, 1], got 2. {MOMENTUM}")],
    "epsilon": [(-1, ValueError, "epsilon must be a finite number, not negative, got -1.")],
    "dtype": [("int32", TypeError, "dtype must be a floating dtype, got int32.")],
    "param_dtype": [("int32", TypeError, "param_dtype must be a floating dtype, got int32.")],
    "use_bias": [("no", ValueError, "use_bias must be a Python bool, got 'no' of type str.")],
    "use_scale": [
        (None, ValueError, "use_scale must be a Python bool, got None of type NoneType."),
    ],
    "frozen": [(1, ValueError, "frozen must be a Python bool, got 1 of type int.")],
    "track": [("no", ValueError, "track must be a Python bool, got 'no' of type str.")],
    "bias_init": [(0, TypeError, "bias_init must be a function, got 0.")],
    "scale_init": [(0, TypeError, "scale_init must be a function, got 0.")],
    "axis_name": [
        (name, ValueError, f"axis_name must be the name of a mapped axis, a tuple of them, or "
         f"None, got {name}.") for name in (3, ())
    ] + [(("a", "a"), ValueError, "axis_name must name each mapped axis once, got ('a', 'a').")],
    "axis_index_groups": [
        (((0, 1),), ValueError, "axis_index_groups=((0, 1),) are groups of an axis: axis_name must "
         "name it, got None."),
    ],
    "batch_variance": [
        ("fast", ValueError, "batch_variance must be 'biased' or 'unbiased', got 'fast'."),
    ],
    "running_variance": [
        (None, ValueError, "running_variance must be 'biased' or 'unbiased', got None."),
    ],
    "virtual_batch_size": [
        (size, ValueError, f"virtual_batch_size must be None or a positive integer, got {size}.")
        for size in (0, 2.0)
    ],
}  # fmt: skip
CASES = [(option, *case) for option, cases in BAD.items() for case in cases]
# Accepted for Flax's sake, without effect.
WITHOUT_EFFECT = {"use_fast_variance", "force_float32_reductions"}
# Linen's own fields, and what only the NNX constructor takes.
OTHERS = {"parent", "name", "num_features", "rngs", "bias_metadata", "scale_metadata"}


def make(layer: str, **options):
    if layer == "nnx":
        return jaxbn.nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(0), **options)
    module = jaxbn.linen.BatchNorm(**{"use_running_average": False, **options})
    return module.init(jax.random.key(0), np.ones((4, FEATURES), np.float32))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("option", "value", "error", "text"), CASES)
def test_a_bad_option_is_refused_before_any_step(option, value, error, text, layer):
    with raises(error, text):
        make(layer, **{option: value})


@pytest.mark.parametrize(("option", "value", "error", "text"), CASES)
def test_linen_refuses_a_bad_option_where_initialization_is_in_evaluation(
    option, value, error, text
):
    with raises(error, text):
        make("linen", **{"use_running_average": True, option: value})


@pytest.mark.parametrize("train", [True, False])
def test_linen_refuses_an_axis_that_the_input_lacks(train):
    with raises(ValueError, "axis=2 is out of range for the shape (4, 3): an axis must lie in "
                "[-2, 1]."):  # fmt: skip
        make("linen", use_running_average=not train, axis=2)


def test_promote_dtype_must_be_a_function():
    with raises(TypeError, "promote_dtype must be a function, got None."):
        make("nnx", promote_dtype=None)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_option_of_a_layer_is_in_the_table_above(layer):
    names = set(inspect.signature(LAYERS[layer].__init__).parameters) - {"self"}
    assert names - WITHOUT_EFFECT - OTHERS - {"promote_dtype"} == set(BAD)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_hand_on_every_option_with_the_defaults_of_flax(layer):
    function = inspect.signature(jaxbn.batch_norm).parameters
    assert set(Options._fields) == set(function) - {"params", "state", "x", "train"} - {
        "mask",
        "dtype",
    }
    defaults = inspect.signature(LAYERS[layer].__init__).parameters
    for name in Options._fields:
        assert defaults[name].default == jaxbn.FLAX.get(name, function[name].default), name


@pytest.mark.parametrize("train", [True, False])
def test_the_function_refuses_bad_options_in_either_mode(train):
    x = np.ones((4, FEATURES), np.float32)
    for option, value, error, text in CASES:
        if option in Options._fields:
            with raises(error, text):
                jaxbn.batch_norm(*jaxbn.init(x.shape), x, train, **{option: value})
