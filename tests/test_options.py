"""The options of a batch norm: listed once, and checked before any training step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._options import Options

FEATURES = 3
LAYERS = {"linen": jaxbn.linen.BatchNorm, "nnx": jaxbn.nnx.BatchNorm}

# Values that no input makes valid, with the error and a part of its text.
BAD = {
    "use_running_average": ("yes", ValueError, "use_running_average must be a Python bool"),
    "axis": (1.5, ValueError, "axis must be an integer or a sequence"),
    "momentum": (2, ValueError, r"momentum must be None or lie in \[0, 1\], got 2"),
    "epsilon": (-1e-5, ValueError, "epsilon must be a finite number, not negative"),
    "dtype": (jnp.int32, TypeError, "dtype must be a floating dtype"),
    "param_dtype": (jnp.int32, TypeError, "param_dtype must be a floating dtype"),
    "use_bias": (1, ValueError, "use_bias must be a Python bool"),
    "use_scale": (1, ValueError, "use_scale must be a Python bool"),
    "bias_init": (0, TypeError, "bias_init must be a function, got 0"),
    "scale_init": (0, TypeError, "scale_init must be a function, got 0"),
    "axis_name": (3, ValueError, "axis_name must be the name of a mapped axis"),
    "axis_index_groups": (((0,), (1,)), ValueError, "axis_name must name it, got None"),
    "batch_variance": ("ubiased", ValueError, "batch_variance must be 'biased' or 'unbiased'"),
    "running_variance": (None, ValueError, "running_variance must be 'biased' or 'unbiased'"),
    "virtual_batch_size": (0, ValueError, "virtual_batch_size must be None or a positive integer"),
}
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
@pytest.mark.parametrize("option", BAD)
def test_a_bad_option_is_refused_before_any_step(option, layer):
    value, error, text = BAD[option]
    with pytest.raises(error, match=text):
        make(layer, **{option: value})


@pytest.mark.parametrize("option", [name for name in BAD if name != "use_running_average"])
def test_linen_refuses_a_bad_option_where_initialization_is_in_evaluation(option):
    value, error, text = BAD[option]
    with pytest.raises(error, match=text):
        make("linen", use_running_average=True, **{option: value})


def test_promote_dtype_must_be_a_function():
    with pytest.raises(TypeError, match="promote_dtype must be a function, got None"):
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
    for option in Options._fields:
        value, error, text = BAD[option]
        with pytest.raises(error, match=text):
            jaxbn.batch_norm(*jaxbn.init(x.shape), x, train, **{option: value})
