"""The number of collectives in compiled programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from benchmarks import collectives as benchmark
from benchmarks import scaling
from tests import forms

pytestmark = pytest.mark.usefixtures("without_compilation_cache")

SHAPE = (16, 5, 6)


def collectives(compiled) -> list[str]:
    return [collective.kind for collective in benchmark.collectives(compiled)]


@pytest.fixture
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture(params=[False, True], ids=["", "masked"])
def batch(request):
    x = jnp.ones(SHAPE)
    return (x, jnp.ones(SHAPE, bool)) if request.param else (x,)


def forward(params, state, x, mask=None, train=True, axis_name="data"):
    return jaxbn.batch_norm(params, state, x, train, mask=mask, axis_name=axis_name)


def backward(params, state, *batch, train=True, axis_name="data"):
    def of_params_and_x(params, x):
        return forward(params, state, x, *batch[1:], train=train, axis_name=axis_name)

    y, vjp, state = jax.vjp(of_params_and_x, params, batch[0], has_aux=True)
    return y, state, vjp(y)


def shard_mapped(function, mesh, batch, check, gradients=False):
    parameters = P() if check else P("data")
    out = (P("data"), P(), (parameters, P("data"))) if gradients else (P("data"), P())
    params, state = jaxbn.init(SHAPE, keepdims=True)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P(), P(), *[P("data")] * len(batch)),
        out_specs=out,
        check_vma=check,
    )
    return jax.jit(mapped).lower(params, state, *batch).compile()


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_has_one_forward_and_one_backward(mesh, batch, check):
    """If the check sums the gradients of parameters, the backward collective carries them too."""
    assert collectives(shard_mapped(forward, mesh, batch, check)) == ["all-gather"]
    both = shard_mapped(backward, mesh, batch, check, gradients=True)
    assert collectives(both) == ["all-gather", "all-reduce"]


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_in_half_precision_has_one_sum_each_way(mesh, batch, check):
    """The bytes of a collective do not grow with the number of devices."""
    batch = (batch[0].astype(jnp.bfloat16), *batch[1:])
    assert collectives(shard_mapped(forward, mesh, batch, check)) == ["all-reduce"]
    both = shard_mapped(backward, mesh, batch, check, gradients=True)
    assert collectives(both) == ["all-reduce"] * 2


def test_pmap_has_one_forward_and_one_backward(batch):
    params, state = jaxbn.init(SHAPE)
    split = [v.reshape(8, 2, *SHAPE[1:]) for v in batch]
    axes = (None, None, *[0] * len(batch))
    for function, found in [(forward, ["all-gather"]), (backward, ["all-gather", "all-reduce"])]:
        mapped = jax.pmap(function, axis_name="data", in_axes=axes)
        assert collectives(mapped.lower(params, state, *split).compile()) == found


def under_jit(function, mesh, batch, form):
    """Return the program compiled for a sharded batch, in the form for a platform."""
    sharded, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    params, state = jax.device_put(jaxbn.init(SHAPE), replicated)
    batch = jax.device_put(batch, sharded)
    out = (sharded, replicated)
    if function is backward:
        out = (*out, (replicated, sharded))
    with forms.of(form):
        jitted = jax.jit(function, static_argnames="axis_name", out_shardings=out)
        return jitted.lower(params, state, *batch, axis_name=None).compile()


def collectives_under_jit(function, mesh, batch, form):
    return collectives(under_jit(function, mesh, batch, form))


def test_jit_on_a_cpu_adds_the_moments_forward_and_once_more_if_they_cancel(mesh, batch):
    """The second time is in the loop that reads the batch again; the backward pass adds once more.

    Each sum has one number per feature. How XLA combines the sums depends on its version, so their
    bytes are counted.
    """
    sums = 2 + (len(batch) > 1)
    found = [
        benchmark.collectives(under_jit(function, mesh, batch, "cpu"))
        for function in (forward, backward)
    ]
    assert {c.kind for each in found for c in each} == {"all-reduce"}
    added = [sum(c.bytes for c in each) for each in found]
    assert added == [4 * SHAPE[-1] * n for n in (2 * sums, 3 * sums)]
    if jax.__version__ == "0.10.2":
        assert [len(each) for each in found] == [2, 3]


def test_jit_on_a_tpu_has_three_forward_and_one_backward(mesh, batch):
    """Two are of the shift: the sampled mean, and the deviation from it with its square.

    The third is of the moments. Under a mask the count, which the shift needs, comes first.
    """
    count = 3 + (len(batch) > 1)
    assert collectives_under_jit(forward, mesh, batch, "tpu") == ["all-reduce"] * count
    assert collectives_under_jit(backward, mesh, batch, "tpu") == ["all-reduce"] * (count + 1)


def test_jit_on_a_tpu_in_half_precision_has_one_forward_and_one_backward(mesh):
    """The shift is the running mean, which every device has."""
    x = (jnp.ones(SHAPE, jnp.bfloat16),)
    assert collectives_under_jit(forward, mesh, x, "tpu") == ["all-reduce"]
    assert collectives_under_jit(backward, mesh, x, "tpu") == ["all-reduce"] * 2


def test_evaluation_has_none(mesh, batch):
    def evaluate(params, state, *batch):
        return forward(params, state, *batch, train=False)

    assert collectives(shard_mapped(evaluate, mesh, batch, check=True)) == []


@pytest.mark.parametrize("form", forms.FORMS)
@pytest.mark.parametrize("train", [True, False])
def test_explicit_sharding_adds_up_and_gathers_nothing(form, train, batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    step = jax.jit(partial(backward, train=train, axis_name=None))
    with jax.set_mesh(mesh), forms.of(form):
        sharded = jax.device_put(batch, NamedSharding(mesh, P("data", None, None)))
        found = collectives(step.lower(*jaxbn.init(SHAPE), *sharded).compile())
    assert set(found) == {"all-reduce"}


@pytest.mark.parametrize("devices", [2, 8])
def test_the_bytes_that_the_model_of_scaling_assumes(devices):
    for dtype, bytes_ in [
        ("float32", scaling.table_bytes(devices, 64)),
        ("bfloat16", scaling.sums_bytes(64)),
    ]:
        forward, backward = benchmark.of_batch_norm(devices, 64, dtype)
        assert [c.bytes for c in forward] == [bytes_]
        assert [c.bytes for c in backward] == [scaling.backward_bytes(64)]


def test_the_count_sees_a_collective(mesh):
    def total(x):
        return jax.lax.psum(x, "data")

    mapped = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P()))
    assert collectives(mapped.lower(np.ones(8)).compile()) == ["all-reduce"]
