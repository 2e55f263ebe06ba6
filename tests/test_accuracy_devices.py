"""Inputs on which float32 batch norms lose digits, as batches that eight devices share.

Each form of the computation that `jaxbn._fusion` has for some platform is run on CPUs.
"""

from functools import cache, partial
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import _devices
from tests import forms, oracle
from tests.accuracy import BIAS, DY, LAYOUTS, SCALE, assert_accurate, step
from tests.hard_inputs import ARRANGEMENTS, CONSTANTS, INPUTS, C, N, arranged

DEVICES = 8
# Device i has i of seven rows, so the first has none.
UNEQUAL = (np.arange(N) % 7 < np.arange(N) // (N // DEVICES))[:, None]

every_form = pytest.mark.parametrize("form", forms.FORMS)


def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@cache
def by_shard_map(form):
    mapped = jax.shard_map(
        partial(step, axis_name="data"),
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=oracle.Result(P("data"), P("data"), P(), P(), P(), P()),
    )
    return forms.jit(mapped, form)


@cache
def by_sums(form):
    """As so many devices share statistics that a table of their moments would be too large."""

    def of_many(*arrays):
        with mock.patch.object(_devices, "FEW_DEVICES", DEVICES - 1):
            return step(*arrays, axis_name="data")

    mapped = jax.shard_map(
        of_many,
        mesh=mesh(),
        in_specs=P("data"),
        out_specs=oracle.Result(P("data"), P("data"), P(), P(), P(), P()),
    )
    return forms.jit(mapped, form)


@cache
def by_jit(form):
    """Statistics are shared because the batch is sharded, without any name."""
    compiled, sharding = forms.jit(step, form), NamedSharding(mesh(), P("data"))
    return lambda *arrays: compiled(*(jax.device_put(a, sharding) for a in arrays))


WAYS = {
    "shard_map": (by_shard_map, "rows", None),
    "shard_map, unequal counts": (by_shard_map, "rows", UNEQUAL),
    "shard_map, by sums": (by_sums, "rows", None),
    "shard_map, by sums, unequal counts": (by_sums, "rows", UNEQUAL),
    "jit, rows": (by_jit, "rows", None),
    "jit, images": (by_jit, "NHWC", None),
}


def run(way, form, x, dy=DY):
    function, layout, mask = WAYS[way]
    into, back, _ = LAYOUTS[layout]
    arrays = [into(v) for v in (x, dy, mask) if v is not None]
    y, dx, *others = jax.tree.map(np.asarray, function(form)(*arrays))
    return oracle.Result(back(y), back(dx), *others)


@every_form
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", INPUTS)
def test_hard_inputs(name, way, form):
    for arrangement in ARRANGEMENTS:
        x = arranged(name, arrangement)
        truth = oracle.batch_norm(x, DY, SCALE, BIAS, mask=WAYS[way][2])
        assert_accurate(run(way, form, x), truth, form, way, arrangement)


@every_form
@pytest.mark.parametrize("way", [way for way in WAYS if "by sums" not in way])
def test_constant_features_are_exact(way, form):
    x = np.resize(np.array(CONSTANTS, np.float32), C) + np.zeros((N, 1), np.float32)
    result = run(way, form, x)
    np.testing.assert_array_equal(result.y, np.broadcast_to(BIAS, x.shape))
    np.testing.assert_array_equal(result.mean, x[0])
    np.testing.assert_array_equal(result.var, 0)


@every_form
@pytest.mark.parametrize("way", [way for way in WAYS if "by sums" in way])
def test_constant_features_by_sums(way, form):
    """The mean, in two floats, is within a rounding of the second of them, which has 24 bits, too.

    `epsilon` makes that of `y` 1 / sqrt(1e-5) times as large.
    """
    x = np.resize(np.array(CONSTANTS[:-1], np.float32), C) + np.zeros((N, 1), np.float32)
    result = run(way, form, x)
    error = np.abs(result.y - np.broadcast_to(BIAS, x.shape))
    assert np.all(error <= SCALE * 316.3 * 4 * 2.0**-48 * np.abs(x))
    np.testing.assert_allclose(result.mean, x[0], rtol=2.0**-23)
    assert np.all(result.var <= (2.0**-46 * x[0]) ** 2)
