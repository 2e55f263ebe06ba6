"""A smaller last ghost batch: what is compiled and kept, across devices, in layers and tools."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from jaxbn.health import check
from tests import close, forms, ghosts
from tests.ghosts import SIZE, C, batch, params_and_state
from tests.raises import raises

assert_close = partial(close.assert_close, tolerance=1e-12)


def program(examples, form):
    params, state = jaxbn.init((examples, C))

    def loss(x):
        y, new = jaxbn.batch_norm(params, state, x, True, virtual_batch_size=SIZE)
        return jnp.sum(y**2), new

    with forms.of(form):
        return str(jax.make_jaxpr(jax.grad(loss, has_aux=True))(jnp.ones((examples, C))))


@pytest.mark.parametrize("form", forms.FORMS)
def test_only_a_smaller_group_is_computed_by_itself(form):
    """A program without one contains none of this, and no program branches or loops for it."""
    of_moments = "while[" if form == "cpu" else "sqrt"
    equal, smaller = program(3 * SIZE, form), program(3 * SIZE + 2, form)
    for name in ("concatenate[", "split["):
        assert name not in equal and name in smaller
    for name in (of_moments, "cond[", "while["):
        assert smaller.count(name) == 2 * equal.count(name)


@pytest.mark.parametrize("masked", [False, True])
def test_the_backward_pass_keeps_the_batch_as_it_came(masked):
    params, state = jaxbn.init((14, 5, C))
    x = jnp.ones((14, 5, C), jnp.bfloat16)
    mask = jnp.ones((14, 5, 1), bool) if masked else None

    def step(x, params, mask):
        return jaxbn.batch_norm(params, state, x, True, mask=mask, virtual_batch_size=SIZE)[0]

    _, vjp = jax.vjp(jax.jit(step), x, params, mask)
    # Parts of the batch would have all but the last group, or the last one only.
    kept = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size >= 2 * 5]
    wanted = [(x.shape, x.dtype)] + ([(mask.shape, mask.dtype)] if masked else [])
    by_rank = [(leaf.shape, leaf.dtype) for leaf in kept if leaf.ndim == x.ndim]
    assert sorted(by_rank, key=str) == sorted(wanted, key=str)
    # The others are the moments of the groups.
    assert all(leaf.size <= 4 * C for leaf in kept if leaf.ndim != x.ndim)


@pytest.mark.usefixtures("x64")
def test_export_for_any_batch_size(rng):
    params, state = params_and_state(rng)
    (size,) = export.symbolic_shape("b")

    @jax.jit
    def step(x):
        return jaxbn.batch_norm(params, state, x, True, virtual_batch_size=SIZE)

    exported = export.export(step)(jax.ShapeDtypeStruct((size, 5, C), jnp.float64))
    for examples in (1, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE):
        x = batch(rng, examples)
        # The compiler adds in another order if it knows the sizes.
        assert_close(exported.call(x), step(x))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
def test_devices_with_a_smaller_group_each(rng, masked):
    """The state moves towards the mean over the groups with values, of which some have more."""
    params, state = params_and_state(rng)
    x = batch(rng, 8 * 6).reshape(8, 6, 5, C)
    mask = jnp.ones((8, 6, 1, 1), bool)
    if masked:
        mask = jnp.asarray(rng.random((8, 6, 1, 1)) < 0.6).at[2, SIZE:].set(False)

    def step(x, mask):
        options = {"mask": mask, "axis_name": "devices", "virtual_batch_size": SIZE}
        return jaxbn.batch_norm(params, state, x, True, **options)

    groups = [group for own in zip(x, mask, strict=True) for group in ghosts.parts(*own)]
    ys, new = ghosts.normalized_alone(params, state, groups)
    y = jnp.concatenate(ys).reshape(x.shape)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.shard_map(
        lambda x, mask: step(x[0], mask[0]),
        mesh=mesh,
        in_specs=P("devices"),
        out_specs=(P("devices"), P()),  # the check: the state is the same on all devices
    )
    found_y, found = jax.jit(over)(x, mask)
    assert_close((found_y.reshape(x.shape), found), (y, new))
    found_y, found = jax.pmap(step, axis_name="devices")(x, mask)
    assert_close((found_y, jax.tree.map(lambda leaf: leaf[3], found)), (y, new))


@pytest.mark.usefixtures("x64")
def test_sharded_batches_under_jit(rng):
    params, state = params_and_state(rng)
    x = batch(rng, 8 * 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
    step = partial(jaxbn.batch_norm, params, state, train=True, virtual_batch_size=9)
    assert_close(jax.jit(step)(sharded), ghosts.one_by_one(params, state, x, size=9))


def test_explicitly_sharded_batches():
    params, state = jaxbn.init((8 * 3, C))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = np.random.default_rng(0).normal(size=(8 * 3, C)).astype(np.float32)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
    step = partial(jaxbn.batch_norm, params, state, train=True)
    with raises(ValueError, "virtual_batch_size must divide the number of examples on each device, "
                "3 in x of shape (24, 3), which is explicitly sharded by P('data', None), got 9."
                ):  # fmt: skip
        jax.jit(partial(step, virtual_batch_size=9))(sharded)
    # A single group may span devices; a few roundings of float32, for sums in another order.
    found = jax.jit(partial(step, virtual_batch_size=100))(sharded)
    close.assert_close(found, step(jnp.asarray(x)), 1e-6)


def test_layers_and_tools(rng):
    x = batch(rng, 64 + 7).astype(jnp.float32)
    layer = jaxbn.linen.BatchNorm(use_running_average=False, virtual_batch_size=32)
    variables = layer.init(jax.random.key(0), x)
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    wanted = jaxbn.batch_norm(
        variables["params"],
        variables["batch_stats"],
        x,
        True,
        virtual_batch_size=32,
        **jaxbn.FLAX,
    )
    close.assert_equal((y, updates["batch_stats"]), wanted)
    module = jaxbn.nnx.BatchNorm(C, virtual_batch_size=32, rngs=nnx.Rngs(0))
    close.assert_equal(module(x), y)
    close.assert_equal(module.var[...], wanted[1]["var"])

    # The data set is one batch, without groups.
    exact = recalibrate(layer, variables, [x[:40], x[40:]])
    mean = np.asarray(x).mean((0, 1))
    close.assert_close(exact["batch_stats"]["mean"], mean, 1e-5)  # sums of float32
    assert check(layer, exact, [x]).ok
