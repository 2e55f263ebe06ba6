"""Results on real activations in their spatial order, and on a million values per feature."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_sample_image

from tests import forms, oracle
from tests.accuracy import BIAS, SCALE, TOLERANCE, step_in


@cache
def stem() -> np.ndarray:
    """Return the output of a network's first convolution on a photograph, in float32.

    The photograph is normalized as for ImageNet. The kernel has size 3, stride 2 and He's
    initialization. Sky fills the upper half, so a few rows do not represent the others.
    """
    photograph = load_sample_image("china.jpg")[None].astype(np.float32) / 255
    x = (photograph - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 3, 16)) * (2 / 27) ** 0.5
    y = jax.lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32),
        kernel,
        (2, 2),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return np.asarray(y)


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_stem_of_a_network_on_a_photograph(axis):
    x = np.moveaxis(stem(), -1, axis)
    dy = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    truth = oracle.batch_norm(x, dy, SCALE, BIAS, axis=axis)
    for form in forms.FORMS:
        ours = step_in(form, axis)(x, dy)
        keys = ("y", "mean", "var") if form == "cuda" else ("y", "mean", "var", "dx")
        for key in keys:
            assert oracle.error(getattr(ours, key), getattr(truth, key)) <= TOLERANCE, (form, key)


@pytest.mark.parametrize("mean", [1e7, 1.0])
@pytest.mark.parametrize("shape", [(2**20, 3), (64, 128, 128, 3)])
def test_a_million_values(mean, shape):
    """Sums of this many numbers lose digits unless they are added in a tree."""
    x = (mean + np.random.default_rng(6).normal(size=shape)).astype(np.float32)
    dy = np.random.default_rng(7).normal(size=shape).astype(np.float32)
    scale, bias = SCALE[:3], BIAS[:3]
    truth = oracle.batch_norm(x, dy, scale, bias)
    for form in forms.FORMS:
        ours = step_in(form)(x, dy, None, scale, bias)
        assert oracle.error(ours.y, truth.y) <= TOLERANCE, form
        assert np.all(np.abs(ours.var - truth.var) <= TOLERANCE * truth.var), form
        assert np.all(np.abs(ours.mean - truth.mean) <= TOLERANCE * np.abs(truth.mean)), form
        if form != "cuda":
            # Only a CPU adds the complex numbers of this form one by one.
            assert oracle.error(ours.dx, truth.dx) <= TOLERANCE, form
