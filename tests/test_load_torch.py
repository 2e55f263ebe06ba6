"""Flax models compute what PyTorch's do, once their state dicts are loaded."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxbn.convert import load_torch, variables_from_torch
from tests.loading import (
    CASES,
    TOLERANCE,
    features_last,
    random_input,
    run_torch,
    with_random_weights,
)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_layer_in_linen(x64, case):
    theirs, x = with_random_weights(case.torch()), random_input(case.shape)
    variables = jax.eval_shape(case.linen.init, jax.random.key(0), features_last(x))
    told = {} if case.transpose_kernel is None else {"": case.transpose_kernel}
    variables = variables_from_torch(
        theirs.state_dict(), {"": ""}, variables, transpose_kernel=told
    )
    y = jax.jit(case.linen.apply)(variables, features_last(x))
    assert error(y, run_torch(theirs, x)) <= TOLERANCE


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_layer_in_nnx(x64, case):
    theirs, x = with_random_weights(case.torch()), random_input(case.shape)
    ours = case.nnx(nnx.Rngs(0))
    load_torch(ours, theirs.state_dict(), {"": ""})
    assert error(nnx.jit(ours)(features_last(x)), run_torch(theirs, x)) <= TOLERANCE
