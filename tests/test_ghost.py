"""With `virtual_batch_size`, each group of examples is normalized by its own statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from tests import close, ghosts
from tests.ghosts import OPTIONS, SIZE, C, N, batch, params_and_state
from tests.raises import raises

assert_close = partial(close.assert_close, tolerance=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_each_group_is_a_batch_of_its_own(rng, options, masked):
    params, state = params_and_state(rng)
    x, dy = batch(rng), batch(rng)
    mask = jnp.asarray(rng.random((N, 1, 1)) < 0.7) if masked else None

    def grouped(params, x):
        return jaxbn.batch_norm(
            params, state, x, True, mask=mask, virtual_batch_size=SIZE, **options
        )

    def wanted(params, x):
        return ghosts.one_by_one(params, state, x, mask, **options)

    @partial(jax.jit, static_argnums=0)
    def both_ways(step, params, x):
        y, vjp, new = jax.vjp(step, params, x, has_aux=True)
        return y, new, vjp(dy)

    found = both_ways(grouped, params, x)
    assert_close(found, both_ways(wanted, params, x), tolerance=1e-10)
    whole, _ = jaxbn.batch_norm(params, state, x, True, mask=mask, **options)
    assert np.abs(whole - found[0]).max() > 1e-2  # not what the whole batch's statistics give


@pytest.mark.usefixtures("x64")
def test_groups_without_values_are_left_out_of_the_mean(rng):
    params, state = params_and_state(rng)
    x = batch(rng)
    mask = jnp.ones((N, 1, 1), bool).at[:SIZE].set(False)
    x = x.at[:SIZE].set(jnp.nan)
    y, new = jaxbn.batch_norm(params, state, x, True, mask=mask, virtual_batch_size=SIZE)
    rest_y, rest = jaxbn.batch_norm(params, state, x[SIZE:], True, virtual_batch_size=SIZE)
    assert_close((y[SIZE:], new), (rest_y, rest))
    assert_close(y[:SIZE], jnp.broadcast_to(params["bias"], y[:SIZE].shape))
    _, same = jaxbn.batch_norm(
        params, state, x, True, mask=jnp.zeros_like(mask), virtual_batch_size=SIZE
    )
    assert_close(same, state, tolerance=0)


def test_the_whole_batch_as_one_group_is_the_batch(rng):
    params, state = jaxbn.init((N, 5, C))
    x = batch(rng, far=1e4)
    wanted = jaxbn.batch_norm(params, state, x, True)
    # The same sums in another order, which two roundings of the largest value bound.
    assert_close(
        jaxbn.batch_norm(params, state, x, True, virtual_batch_size=N), wanted, tolerance=2e-6
    )


def test_evaluation_has_no_groups(rng):
    params, state = jaxbn.init((N, 5, C))
    x = batch(rng)[:1]  # whose only value has no unbiased variance
    wanted = jaxbn.batch_norm(params, state, x, False)
    assert_close(
        jaxbn.batch_norm(params, state, x, False, virtual_batch_size=SIZE), wanted, tolerance=0
    )


def test_without_a_state_evaluation_has_groups_too(rng):
    params, _ = jaxbn.init((N, 5, C))
    x = batch(rng)
    train, _ = jaxbn.batch_norm(params, None, x, True, virtual_batch_size=SIZE)
    evaluate, _ = jaxbn.batch_norm(params, None, x, False, virtual_batch_size=SIZE)
    assert_close(train, evaluate, tolerance=0)


@pytest.mark.usefixtures("x64")
def test_features_first_and_several_feature_axes(rng):
    x = batch(rng)
    params, state = params_and_state(rng)
    wanted_y, wanted = jaxbn.batch_norm(params, state, x, True, virtual_batch_size=SIZE)
    y, new = jaxbn.batch_norm(
        params, state, jnp.moveaxis(x, -1, 0), True, axis=0, virtual_batch_size=SIZE
    )
    assert_close((jnp.moveaxis(y, 0, -1), new), (wanted_y, wanted))
    params, state = jaxbn.init(x.shape, (1, 2))
    y, _ = jaxbn.batch_norm(params, state, x, True, axis=(1, 2), virtual_batch_size=SIZE)
    groups = y.reshape(-1, SIZE, 5, C)
    np.testing.assert_allclose(groups.mean(1), 0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("masked", [False, True])
def test_devices_with_groups_equal_one_with_the_whole_batch(rng, masked):
    params, state = params_and_state(rng)
    x = jnp.asarray(rng.normal(size=(8 * N, C)))
    mask = jnp.asarray(rng.random((8 * N, 1)) < 0.6) if masked else jnp.ones((8 * N, 1), bool)

    def step(x, mask, axis_name=None):
        return jaxbn.batch_norm(
            params, state, x, True, mask=mask, axis_name=axis_name, virtual_batch_size=SIZE
        )

    wanted = step(x, mask)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.shard_map(
        lambda x, mask: step(x, mask, "devices"),
        mesh=mesh,
        in_specs=(P("devices"), P("devices")),
        out_specs=(P("devices"), P()),  # the check: the state is the same on all devices
    )
    assert_close(jax.jit(over)(x, mask), wanted)
    batch_sharded = jax.device_put((x, mask), jax.NamedSharding(mesh, P("devices")))
    assert_close(jax.jit(step)(*batch_sharded), wanted)
    pairs = [[0, 1], [2, 3], [4, 5], [6, 7]]
    _, new = jax.pmap(
        lambda x, mask: jaxbn.batch_norm(
            *(params, state, x, True),
            **{"mask": mask, "axis_name": "i", "axis_index_groups": pairs},
            virtual_batch_size=SIZE,
        ),
        axis_name="i",
    )(x.reshape(8, N, C), mask.reshape(8, N, 1))
    for k in range(4):
        part = slice(2 * k * N, 2 * (k + 1) * N)
        assert_close(jax.tree.map(lambda v, k=k: v[2 * k], new), step(x[part], mask[part])[1])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_batches_under_jit(rng, kind):
    params, state = jaxbn.init((8 * SIZE, C))
    x = jnp.asarray(rng.normal(size=(8 * SIZE, C)), jnp.float32)
    wanted = jaxbn.batch_norm(params, state, x, True, virtual_batch_size=SIZE)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("data")))

    @jax.jit
    def step(x):
        return jaxbn.batch_norm(params, state, x, True, virtual_batch_size=SIZE)

    # Sums of a group's values in another order: two roundings.
    assert_close(step(sharded), wanted, tolerance=1e-6)


def test_transforms(rng):
    params, state = jaxbn.init((N, 5, C))
    x = batch(rng).astype(jnp.bfloat16)

    def loss(x):
        y, _ = jaxbn.batch_norm(params, state, x, True, virtual_batch_size=SIZE)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    gradient = jax.jit(jax.grad(loss))
    assert gradient(x).dtype == x.dtype
    hessian = jax.jit(jax.hessian(loss))(x.astype(jnp.float32)[:SIZE])
    assert np.isfinite(hessian).all() and np.abs(hessian).max() > 0
    many = jnp.stack([x, 2 * x])
    # One program or the other: roundings of bfloat16 gradients, of which the largest is about 1.
    np.testing.assert_allclose(
        jax.jit(jax.vmap(gradient))(many)[1].astype(jnp.float32),
        gradient(2 * x).astype(jnp.float32),
        atol=2e-2,
    )


def test_the_layers_have_them_too(rng):
    x = batch(rng)
    layer = jaxbn.linen.BatchNorm(
        use_running_average=False, virtual_batch_size=SIZE, **jaxbn.PYTORCH
    )
    variables = layer.init(jax.random.key(0), x)
    wanted_y, wanted = jaxbn.batch_norm(
        variables["params"], variables["batch_stats"], x, True, virtual_batch_size=SIZE
    )
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    assert_close((y, updates["batch_stats"]), (wanted_y, wanted), tolerance=0)

    layer = jaxbn.nnx.BatchNorm(C, virtual_batch_size=SIZE, **jaxbn.PYTORCH, rngs=nnx.Rngs(0))
    assert_close(layer(x), wanted_y, tolerance=0)
    assert_close((layer.mean[...], layer.var[...]), (wanted["mean"], wanted["var"]), tolerance=0)
    with pytest.raises(ValueError, match="virtual_batch_size must be None or a positive integer"):
        jaxbn.nnx.BatchNorm(C, virtual_batch_size=0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("size", [0, -4, 2.0, True, "4"])
def test_what_is_no_size(size):
    params, state = jaxbn.init((N, C))
    with pytest.raises(ValueError) as caught:
        jaxbn.batch_norm(params, state, jnp.ones((N, C)), False, virtual_batch_size=size)
    assert str(caught.value) == (
        f"virtual_batch_size must be None or a positive integer, got {size!r}."
    )


def test_without_an_axis_of_examples_there_are_no_groups():
    params, state = jaxbn.init((C,))
    with raises(ValueError, "virtual_batch_size must be None if every axis is a feature axis: x "
                "has shape (3,) with features on axis 0, got 4."):  # fmt: skip
        jaxbn.batch_norm(params, state, jnp.ones(C), True, virtual_batch_size=SIZE)


def test_groups_of_one_value_have_no_unbiased_variance():
    params, state = jaxbn.init((N, C))
    with raises(ValueError, "x of shape (24, 3) has one value per feature (axis 1) in the last "
                "group of virtual_batch_size=1, which has no unbiased variance; give more values, "
                "or batch_variance='biased' and running_variance='biased'."):  # fmt: skip
        jaxbn.batch_norm(params, state, jnp.ones((N, C)), True, virtual_batch_size=1)


def test_an_empty_batch_leaves_the_state():
    params, state = jaxbn.init((N, C))
    y, new = jaxbn.batch_norm(params, state, jnp.ones((0, C)), True, virtual_batch_size=4)
    assert y.shape == (0, C)
    assert_close(new, state, tolerance=0)
