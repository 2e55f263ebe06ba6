"""Results on inputs that are hard in float32, in batches that eight devices share.

Each form of the computation that `jaxbn._fusion` has for a platform runs on CPUs here.
"""

import itertools
from functools import cache, partial

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn.parity._hard_inputs import CONSTANTS, INPUTS, C, N
from tests import forms, oracle
from tests.accuracy import BIAS, DY, LAYOUTS, SCALE, assert_accurate, step
from tests.hard_inputs import ARRANGEMENTS, arranged

DEVICES = 8
# Device i counts i of every seven rows, so the first device counts none.
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
def by_jit(form):
    """Share statistics without any axis name, because the batch is sharded."""
    compiled, sharding = forms.jit(step, form), NamedSharding(mesh(), P("data"))
    return lambda *arrays: compiled(*(jax.device_put(a, sharding) for a in arrays))


WAYS = {
    "shard_map": (by_shard_map, "rows", None),
    "shard_map, unequal counts": (by_shard_map, "rows", UNEQUAL),
    "jit, rows": (by_jit, "rows", None),
    "jit, images": (by_jit, "NHWC", None),
}


def run(way, form, x, dy=DY):
    function, layout, mask = WAYS[way]
    into, back, _ = LAYOUTS[layout]
    arrays = [into(v) for v in (x, dy, mask) if v is not None]
    y, dx, *others = jax.tree.map(np.asarray, function(form)(*arrays))
    return oracle.Result(back(y), back(dx), *others)


# Extended precision is slow, so one truth serves all ways and forms.
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("mask", [None, UNEQUAL], ids=["", "unequal counts"])
def test_hard_inputs(name, mask):
    ways = [way for way, (*_, own) in WAYS.items() if own is mask]
    assert ways
    for arrangement in ARRANGEMENTS:
        x = arranged(name, arrangement)
        truth = oracle.batch_norm(x, DY, SCALE, BIAS, mask=mask)
        for form, way in itertools.product(forms.FORMS, ways):
            assert_accurate(run(way, form, x), truth, form, way, arrangement)


@every_form
@pytest.mark.parametrize("way", WAYS)
def test_constant_features_are_exact(way, form):
    x = np.resize(np.array(CONSTANTS, np.float32), C) + np.zeros((N, 1), np.float32)
    result = run(way, form, x)
    np.testing.assert_array_equal(result.y, np.broadcast_to(BIAS, x.shape))
    np.testing.assert_array_equal(result.mean, x[0])
    np.testing.assert_array_equal(result.var, 0)
