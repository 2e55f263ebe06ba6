"""Errors of all conversions, by their whole text."""

import equinox as eqx
import numpy as np
import pytest
import torch

from jaxbn import convert
from tests.conversion import assert_same

ONES = np.ones(4, np.float32)
THREE = np.ones(3, np.float32)
TORCH = {"weight": ONES, "bias": ONES, "running_mean": ONES, "running_var": ONES}
KERAS = {"gamma": ONES, "beta": ONES, "moving_mean": ONES, "moving_variance": ONES}
PARAMS = {"scale": ONES, "bias": ONES}
STATE = {"mean": ONES, "var": ONES}
EMA = {"hidden": ONES, "average": ONES, "counter": np.int32(1)}
AVERAGES = {"bn/~/mean_ema": EMA, "bn/~/var_ema": EMA}
WITHOUT_VAR = {"mean": ONES}


def equinox_layer(**options):
    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    return make(4, "batch", mode="batch", **options)


# name: (call, exception, its whole text)
ERRORS = {
    "from torch: keys": (
        lambda: convert.from_torch({"weight": THREE, 3: THREE}),
        TypeError,
        "state_dict must have strings as keys, got 3.",
    ),
    "model of torch: keys": (
        lambda: convert.batch_norms_from_torch({k: THREE for k in (3, b"x", None, 4)}),
        TypeError,
        "state_dict must have strings as keys, got 3, b'x', None.",
    ),
    "torch: all at once": (
        lambda: convert.from_torch(
            {
                "bias": np.ones(4, np.int64),
                "running_mean": THREE,
                "weight": ONES,
                "eps": ONES,
                "num_batches_tracked": ONES,
            }
        ),
        ValueError,
        "state_dict does not hold one batch norm: missing running_var; extra eps; bias has dtype "
        "int64, want a floating one; running_mean has shape (3,), want (4,), that of weight; "
        "num_batches_tracked has shape (4,) and dtype float32, want a scalar of an integer dtype.",
    ),
    "torch: under a prefix": (
        lambda: convert.from_torch({"a.weight": ONES, "a.fc.weight": ONES, "b": ONES}, "a"),
        ValueError,
        "state_dict does not hold one batch norm: missing a.bias; extra a.fc.weight.",
    ),
    "torch: another prefix": (
        lambda: convert.from_torch({"bn1.weight": ONES, "bn1.bias": ONES}, "bn"),
        ValueError,
        "state_dict does not hold one batch norm: none of the 2 entries begins with 'bn.'.",
    ),
    "torch: a count alone": (
        lambda: convert.from_torch({"num_batches_tracked": np.int64(3)}),
        ValueError,
        "state_dict does not hold one batch norm: missing running_mean, running_var.",
    ),
    "torch: not one axis": (
        lambda: convert.from_torch(TORCH | {"weight": np.ones((1, 4), np.float32)}),
        ValueError,
        "state_dict does not hold one batch norm: weight has shape (1, 4), want (C,).",
    ),
    "torch: too many batches": (
        lambda: convert.from_torch(TORCH | {"num_batches_tracked": np.int64(2**31)}),
        ValueError,
        "state_dict does not hold one batch norm: num_batches_tracked is 2147483648, want a "
        "number from 0 to 2147483647.",
    ),
    "torch: no mapping": (
        lambda: convert.from_torch(torch.nn.BatchNorm1d(4)),
        TypeError,
        "state_dict must be a mapping, got BatchNorm1d.",
    ),
    "torch: models": (
        lambda: convert.batch_norms_from_torch(
            {"a.running_mean": ONES, "b.running_var": ONES, "b.running_mean": THREE}
        ),
        ValueError,
        "state_dict holds invalid batch norms: missing a.running_var; b.running_var "
        "has shape (4,), want (3,), that of b.running_mean.",
    ),
    "torch: a model whose norm has lost its statistics": (
        lambda: convert.batch_norms_from_torch({"a.num_batches_tracked": np.int64(1)}),
        ValueError,
        "state_dict holds invalid batch norms: missing a.running_mean, a.running_var.",
    ),
    "to torch: half affine": (
        lambda: convert.to_torch({"bias": ONES}, STATE),
        ValueError,
        "PyTorch's batch norm cannot hold these params and state: missing params['scale']: "
        "PyTorch has a weight and a bias, or neither.",
    ),
    "to torch: all at once": (
        lambda: convert.to_torch(
            {"scale": ONES, "bias": np.ones((2, 2), np.float32), "gamma": ONES},
            {"mean": THREE, "count": np.int32(-1), "n": 1},
        ),
        ValueError,
        "PyTorch's batch norm cannot hold these params and state: missing state['var']; extra "
        "params['gamma'], state['n']; params['bias'] has shape (2, 2), want (C,); state['mean'] "
        "has shape (3,), want (4,), that of params['scale']; state['count'] is -1, want a number "
        "from 0 to 2147483647.",
    ),
    "to torch: no mapping": (
        lambda: convert.to_torch(None, STATE),
        TypeError,
        "params must be a mapping, got NoneType.",
    ),
    "keras: all at once": (
        lambda: convert.from_keras({"a/gamma": ONES, "a/moving_mean": THREE, "a/c": ONES}, "a"),
        ValueError,
        "weights do not hold one batch norm: missing a/moving_variance; extra a/c; a/moving_mean "
        "has shape (3,), want (4,), that of a/gamma.",
    ),
    "to keras: no state": (
        lambda: convert.to_keras(PARAMS, None),
        ValueError,
        "Keras's batch norm cannot hold these params and state: state is None, and Keras's layer "
        "always has running statistics.",
    ),
    "haiku: all at once": (
        lambda: convert.from_haiku(
            {"bn": {"scale": THREE, "bias": ONES}},
            {"bn/~/mean_ema": {"hidden": ONES, "average": ONES, "counter": np.int32(2)}},
            "bn",
        ),
        ValueError,
        "params and state do not hold this Haiku batch norm: missing state['bn/~/var_ema']; "
        "extra params['bn']['bias']; state['bn/~/mean_ema']['hidden'] has shape (4,), want (3,), "
        "that of params['bn']['scale']; state['bn/~/mean_ema']['average'] has shape (4,), want "
        "(3,), that of params['bn']['scale'].",
    ),
    "haiku: an entry": (
        lambda: convert.from_haiku(
            {}, AVERAGES | {"bn/~/var_ema": {"average": ONES, "counter": np.int32(2)}}, "bn"
        ),
        ValueError,
        "params and state do not hold this Haiku batch norm: missing "
        "state['bn/~/var_ema']['hidden']; state['bn/~/mean_ema']['counter'] is 1 and "
        "state['bn/~/var_ema']['counter'] is 2, want the same.",
    ),
    "to haiku: shape": (
        lambda: convert.to_haiku(PARAMS, STATE | {"var": THREE}, shape=(1, 1, 1, 4)),
        ValueError,
        "Haiku's batch norm cannot hold these params and state: state['var'] has shape (3,), "
        "which does not fit (1, 1, 1, 4).",
    ),
    "to haiku: momentum": (
        lambda: convert.to_haiku(PARAMS, STATE, momentum=1.0),
        ValueError,
        "momentum must lie in [0, 1), got 1.0.",
    ),
    "to haiku: no state": (
        lambda: convert.to_haiku(PARAMS, None),
        ValueError,
        "Haiku's batch norm cannot hold these params and state: state is None, and Haiku's layer "
        "always has running statistics.",
    ),
    "equinox: another layer": (
        lambda: convert.from_equinox(eqx.nn.Identity(), None),
        TypeError,
        "layer must be an equinox.nn.BatchNorm, got Identity.",
    ),
    "equinox: another size": (
        lambda: convert.from_equinox(
            *(eqx.tree_at(lambda layer: layer.bias, equinox_layer()[0], THREE), equinox_layer()[1])
        ),
        ValueError,
        "layer and state do not hold a batch norm: layer.bias has shape (3,), want (4,), that of "
        "layer.weight.",
    ),
    "to equinox: all at once": (
        lambda: convert.to_equinox({"scale": THREE}, WITHOUT_VAR, *equinox_layer()),
        ValueError,
        "this Equinox batch norm cannot hold these params and state: missing state['var']; "
        "missing params['bias']; params['scale'] has shape (3,), want (4,), that of the layer's "
        "mean.",
    ),
    "to equinox: params for a plain layer": (
        lambda: convert.to_equinox(PARAMS, STATE, *equinox_layer(channelwise_affine=False)),
        ValueError,
        "this Equinox batch norm cannot hold these params and state: extra params['scale'], "
        "params['bias'].",
    ),
    "to equinox: no state": (
        lambda: convert.to_equinox(PARAMS, None, *equinox_layer()),
        ValueError,
        "this Equinox batch norm cannot hold these params and state: state is None, and "
        "Equinox's layer always has running statistics.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, exception, text = ERRORS[name]
    with pytest.raises(exception) as raised:
        call()
    assert str(raised.value) == text


def test_valid_entries():
    """The cases of `ERRORS` differ from these."""
    assert_same(convert.from_torch(TORCH), (PARAMS, STATE))
    assert_same(convert.from_keras(KERAS), (PARAMS, STATE))
    params = {"bn": {"scale": ONES, "offset": ONES}}
    expected = PARAMS, STATE | {"count": np.int32(1)}
    assert_same(convert.from_haiku(params, AVERAGES, "bn"), expected)
    assert_same(convert.from_torch({}), ({}, None))
    assert convert.to_torch({}, None) == {}
