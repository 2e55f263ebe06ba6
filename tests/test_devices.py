"""N devices compute what one device computes from the whole batch, however they are mapped."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxbn
from tests import forms, oracle
from tests.devices import (
    BATCHES,
    DEVICES,
    FEATURES,
    TOLERANCE,
    WAYS,
    a_device_without,
    compiled_step,
    function,
    join,
    linen,
    problem,
    split,
    step,
    unequal,
)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("layer", [function, linen], ids=["function", "linen"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("way", WAYS)
def test_n_devices_equal_one(way, batch, layer):
    batch, params, state = problem(batch)
    *wanted, wanted_state = compiled_step(*batch, params, state)
    *got, states = WAYS[way](batch, params, state, layer)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((wanted, wanted_state)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), got, wanted)
    for key, each in states.items():
        # Bit-identical on every device.
        each = np.asarray(each).reshape(DEVICES, FEATURES)
        np.testing.assert_array_equal(each, each[:1].repeat(DEVICES, 0))
        np.testing.assert_allclose(each[0], wanted_state[key], rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["cuda", "tpu"])
@pytest.mark.parametrize("batch", ["unequal", "no value at all"])
@pytest.mark.parametrize("way", ["vmap", "shard_map", "jit, batch and features sharded, explicit"])
def test_n_devices_equal_one_in_the_forms_of_other_platforms(way, batch, form):
    with forms.of(form):
        test_n_devices_equal_one(way, batch, function)


@pytest.mark.parametrize("form", ["cpu", "tpu"])
@pytest.mark.parametrize("batch", ["unequal", "no value at all"])
@pytest.mark.parametrize("way", ["shard_map", "vmap in shard_map", "jit, batch sharded"])
def test_n_devices_equal_one_in_half_precision(way, batch, form):
    """The tolerance is a rounding of y and dx in bfloat16, and a few roundings of float32 sums."""
    (x, mask, dy), params, state = problem(batch)
    batch = x.astype(jnp.bfloat16), mask, dy.astype(jnp.bfloat16)
    params, state = (jax.tree.map(lambda v: v.astype(jnp.float32), v) for v in (params, state))
    with forms.of(form):
        *wanted, wanted_state = compiled_step(*batch, params, state)
        *got, states = WAYS[way](batch, params, state, function)

    def assert_close(a, b, rounding):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding * max(1, np.abs(b).max()))

    for a, b in zip(got[:2], wanted[:2], strict=True):
        assert_close(a, b, 2.0**-8)
    for key in params:
        assert_close(got[2][key], wanted[2][key], 2.0**-8)
    for key, each in states.items():
        assert_close(np.asarray(each).reshape(DEVICES, -1)[0], wanted_state[key].ravel(), 2.0**-20)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check", [True, False])
def test_gradients_from_outside_of_shard_map(check):
    batch, params, state = problem("unequal")
    x, mask, dy = batch
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def forward(x, mask, params):
        return jaxbn.batch_norm(params, state, x, True, mask=mask, axis_name="data")[0]

    mapped = jax.shard_map(
        forward,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P()),
        out_specs=P("data"),
        check_vma=check,
    )
    y, vjp = jax.vjp(jax.jit(lambda x, params: mapped(x, mask, params)), x, params)
    wanted = compiled_step(*batch, params, state)[:3]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), (y, *vjp(dy)), wanted
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("groups", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 5], [7, 2], [1, 3], [6, 4]]])
@pytest.mark.parametrize("batch", ["equal", "unequal", "a device without values"])
@pytest.mark.parametrize("way", ["pmap", "shard_map, unchecked"])
def test_groups_of_devices(way, groups, batch):
    """Within each group, N devices equal one. Only these ways of mapping support groups."""
    batch, params, state = problem(batch)
    each = partial(step, params=params, state=state, axis_name="data", axis_index_groups=groups)
    split_batch = split(batch)
    if way == "pmap":
        got = jax.pmap(each, axis_name="data")(*split_batch)
    else:
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

        def one(parts):
            parts = jax.tree.map(lambda v: v[0], parts)
            return jax.tree.map(lambda v: v[None], each(*parts))

        specs = {"in_specs": P("data"), "out_specs": P("data"), "check_vma": False}
        got = jax.jit(jax.shard_map(one, mesh=mesh, **specs))(split_batch)
    for group in groups:
        members = np.array(group)
        part = join(jax.tree.map(lambda v, m=members: v[m], split_batch))
        *wanted, wanted_state = compiled_step(*part, params, state)
        y, dx, dparams, states = jax.tree.map(lambda v, m=members: v[m], got)
        ours = [*join((y, dx)), jax.tree.map(lambda v: v.sum(0), dparams)]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), ours, wanted
        )
        for key, values in states.items():
            np.testing.assert_array_equal(values, values[:1].repeat(len(group), 0))
            np.testing.assert_allclose(values[0], wanted_state[key], rtol=0, atol=TOLERANCE)


HARD = {
    "N(1e5, 1)": lambda rng, n: 1e5 + rng.normal(size=(DEVICES, n, 4)),
    "devices far from one another": lambda rng, n: (
        1e5 * np.arange(DEVICES)[:, None, None] + rng.normal(size=(DEVICES, n, 4))
    ),
    "one huge device": lambda rng, n: (
        np.where(np.arange(DEVICES)[:, None, None] == 5, 1e16, 0.0)
        + rng.normal(size=(DEVICES, n, 4))
    ),
    "one device far from the others": lambda rng, n: (
        np.where(np.arange(DEVICES)[:, None, None] == 5, 1e5, 1.0)
        + rng.normal(size=(DEVICES, n, 4))
    ),
    "devices' means a few deviations apart, far from zero": lambda rng, n: (
        1e5 + 3 * np.arange(DEVICES)[:, None, None] + rng.normal(size=(DEVICES, n, 4))
    ),
}


def tracking(*arguments, **options):
    """Call the function so that the running statistics become those of the batch."""
    return function(*arguments, **options, momentum=0.0)


@pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map", "jit, batch sharded"])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_accuracy_in_float32(way, name, masked):
    rng = np.random.default_rng(1)
    n = 512
    x = HARD[name](rng, n).astype(np.float32).reshape(DEVICES * n, 1, 4)
    dy = rng.normal(size=x.shape).astype(np.float32)
    scale, bias = rng.uniform(0.5, 2, size=(2, 4)).astype(np.float32)
    mask = unequal(rng, x.shape) if masked else None
    truth = oracle.batch_norm(x, dy, scale, bias, mask=mask)
    batch = jax.tree.map(jnp.asarray, (x, mask, dy))
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    state = {"mean": jnp.zeros(4), "var": jnp.zeros(4)}
    y, dx, dparams, states = WAYS[way](batch, params, state, tracking)
    for value, exact in [(y, truth.y), (dx, truth.dx), (dparams["scale"], truth.dscale)]:
        assert oracle.error(value, exact) <= 1e-6
    # The mean to two roundings of its size, or of the deviation where that is more.
    size = np.maximum(np.abs(truth.mean), np.sqrt(truth.var))
    assert np.all(np.abs(np.asarray(states["mean"])[0].reshape(4) - truth.mean) <= 2.4e-7 * size)
    count = x[..., 0].size if mask is None else mask.reshape(-1, 4).sum(0)
    var = truth.var * count / (count - 1)
    assert oracle.error(np.asarray(states["var"])[0].reshape(4), var) <= 1e-6


def test_the_merge_overflows_no_earlier_than_one_device():
    """float32 holds the square of the deviation, 1.7e19, but not that of the value 5e19."""
    x = jnp.where(jnp.arange(DEVICES)[:, None, None, None] == 5, 5e19, jnp.zeros((8, 4, 1, 1)))

    def step(x, axis_name=None):
        state = {"mean": jnp.zeros(1), "var": jnp.zeros(1)}
        return jaxbn.batch_norm({}, state, x, True, momentum=0.0, axis_name=axis_name)

    y, states = jax.vmap(partial(step, axis_name="data"), axis_name="data")(x)
    wanted, state = step(x.reshape(-1, 1, 1))
    assert np.isfinite(state["var"]) and np.all(wanted != 0)
    np.testing.assert_allclose(y.reshape(wanted.shape), wanted, rtol=1e-6)
    for key in state:
        np.testing.assert_allclose(states[key][0], state[key], rtol=1e-6)


@pytest.mark.parametrize("way", ["vmap", "pmap", "shard_map"])
def test_a_feature_constant_on_all_devices_is_exactly_zero(way):
    """Seven devices have values: in float32, a seventh of seven times 3.3 is not 3.3."""
    x = jnp.full((16, 5, FEATURES), 3.3, jnp.float32)
    mask = jnp.asarray(a_device_without(None, x.shape))
    params, state = jaxbn.init(x.shape)
    y, *_ = WAYS[way]((x, mask, jnp.ones_like(x)), params, state, function)
    np.testing.assert_array_equal(y, 0)


def test_evaluation_needs_no_axis_name():
    x = jnp.ones((4, 3))
    params, state = jaxbn.init(x.shape)
    jaxbn.batch_norm(params, state, x, False, axis_name="data")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
def test_second_derivatives_across_devices(rng, check, order):
    params, _ = jaxbn.init((16, 3), param_dtype=jnp.float64)
    x, dx = (jnp.asarray(3 + 2 * rng.normal(size=(16, 3))) for _ in range(2))
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def one(x):
        return jaxbn.batch_norm(params, None, x, True)[0]

    across = jax.shard_map(
        lambda x: jaxbn.batch_norm(params, None, x, True, axis_name="data")[0],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check,
    )

    def second(layer):
        gradient = jax.grad(lambda x: jnp.sum(jnp.sin(layer(x)) * dx))
        if order == "forward over reverse":
            return jax.jit(lambda x: jax.jvp(gradient, (x,), (dx,))[1])(x)
        return jax.jit(jax.grad(lambda x: jnp.sum(gradient(x) * dx)))(x)

    # Float64 sums of 16 values of order one in another order.
    np.testing.assert_allclose(second(across), second(one), rtol=1e-11, atol=1e-11)
