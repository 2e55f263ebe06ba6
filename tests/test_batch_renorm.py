"""`batch_renorm` equals the paper's algorithm in NumPy, on one device and on several."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from tests import numpy_renorm
from tests.close import assert_close, assert_equal
from tests.raises import raises

SHAPE = (16, 3, 5)
MASK = (np.arange(16) % 3 > 0)[:, None, None]
# Loose, so that nothing is clipped; tight, so that everything is; and in between.
LIMITS = [(1e6, 1e6), (1.01, 0.01), (1.15, 0.8)]
# Float64 rounds at 1e-16, and some hundred values of at most ten are summed.
TOLERANCE = 1e-12


def problem(dtype="float64", shape=SHAPE, seed=0):
    """Return parameters, statistics near those of the batch, the batch and a cotangent."""
    rng = np.random.default_rng(seed)
    features = shape[-1]
    params = {k: jnp.asarray(rng.normal(1, 0.5, features), dtype) for k in ("scale", "bias")}
    state = {
        "mean": jnp.asarray(rng.normal(3, 2, features), dtype),
        "var": jnp.asarray(rng.uniform(0.5, 9, features), dtype),
    }
    x, dy = rng.normal(3, 2, shape), rng.normal(size=shape)
    return params, state, jnp.asarray(x, dtype), jnp.asarray(dy, dtype)


def compiled_step(function, params, state, x, dy, **options):
    """Return what `step` does, from one program."""
    return jax.jit(partial(step, function, **options))(params, state, x, dy)


def step(function, params, state, x, dy, **options):
    """Return output, gradients and new state of a training step."""

    def forward(x, params):
        return function(params, state, x, True, **options)

    y, vjp, new = jax.vjp(forward, x, params, has_aux=True)
    return y, *vjp(dy), new


def limited(r_max, d_max):
    return partial(jaxbn.batch_renorm, r_max=r_max, d_max=d_max)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize(("r_max", "d_max"), LIMITS)
def test_equals_an_independent_implementation(r_max, d_max, mask):
    given = problem()
    got = compiled_step(limited(r_max, d_max), *given, mask=mask)
    wanted = numpy_renorm.batch_renorm(
        *jax.tree.map(np.asarray, given), mask, r_max=r_max, d_max=d_max
    )
    assert_close(got, jax.tree.map(jnp.asarray, wanted), TOLERANCE)


@pytest.mark.usefixtures("x64")
def test_some_features_are_clipped_and_some_are_not():
    """Otherwise the limits in between would test nothing new."""
    _, state, x, _ = problem()
    std, running_std = np.sqrt(np.var(x, (0, 1))), np.sqrt(state["var"])
    ratio = std / running_std
    distance = np.abs(np.mean(x, (0, 1)) - state["mean"]) / running_std
    for clipped in ((ratio > 1.15) | (ratio < 1 / 1.15), distance > 0.8):
        assert clipped.any() and not clipped.all()


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 8, "mask": MASK}])
def test_traced_limits_without_correction_give_batch_norm(options):
    """One operation at a time. Compiled, the two programs may round differently."""
    given = problem("float32")

    def renorm(*arguments, **options):
        return jaxbn.batch_renorm(
            *arguments, r_max=jnp.float32(1), d_max=jnp.zeros((), "float32"), **options
        )

    assert_equal(step(renorm, *given, **options), step(jaxbn.batch_norm, *given, **options))


def test_evaluation_is_that_of_batch_norm():
    params, state, x, _ = problem("float32")
    y, same = limited(2, 1)(params, state, x, False)
    assert_equal(y, jaxbn.batch_norm(params, state, x, False)[0])
    assert same is state


def test_the_update_of_the_state_is_that_of_batch_norm():
    params, state, x, _ = problem("float32")
    for options in ({}, {"momentum": 0.5, "virtual_batch_size": 4}):
        new = limited(1.2, 0.1)(params, state, x, True, **options)[1]
        assert_equal(new, jaxbn.batch_norm(params, state, x, True, **options)[1])


@pytest.mark.usefixtures("x64")
def test_ghost_batches_are_renormalized_one_by_one():
    params, state, x, dy = problem()
    train = partial(compiled_step, limited(1.15, 0.8), params, state)
    y, dx, dparams, _ = train(x, dy, virtual_batch_size=4)
    parts = [train(x[i : i + 4], dy[i : i + 4]) for i in range(0, 16, 4)]
    assert_close(y, jnp.concatenate([part[0] for part in parts]), TOLERANCE)
    assert_close(dx, jnp.concatenate([part[1] for part in parts]), TOLERANCE)
    assert_close(dparams, jax.tree.map(lambda *v: sum(v), *(p[2] for p in parts)), TOLERANCE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("map_", [jax.vmap, jax.pmap])
def test_devices_equal_one(map_):
    given = problem()
    mask = jnp.asarray(
        np.random.default_rng(1).random(SHAPE) < np.linspace(0, 1, 16)[:, None, None]
    )
    wanted = compiled_step(limited(1.15, 0.8), *given, mask=mask)
    params, state, x, dy = given

    def each(x, dy, mask):
        return step(limited(1.15, 0.8), params, state, x, dy, mask=mask, axis_name="data")

    split = [v.reshape(8, 2, *v.shape[1:]) for v in (x, dy, mask)]
    y, dx, dparams, new = map_(each, axis_name="data")(*split)
    dparams = jax.tree.map(lambda v: v.sum(0), dparams)
    assert_close((y.reshape(SHAPE), dx.reshape(SHAPE), dparams), wanted[:3], TOLERANCE)
    for i in range(8):
        assert_close(jax.tree.map(lambda v, i=i: v[i], new), wanted[3], TOLERANCE)


def test_sharded_arrays_equal_one_device():
    given = problem("float32")
    wanted = jax.jit(partial(step, limited(1.15, 0.8)))(*given)
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
    sharded = (*given[:2], *jax.device_put(given[2:], sharding))
    # Sums of 48 values in another order.
    assert_close(jax.jit(partial(step, limited(1.15, 0.8)))(*sharded), wanted, 5e-6)


def test_r_and_d_have_no_gradient():
    """Neither through the batch, which tests above show, nor through the state and the limits."""
    params, state, x, _ = problem("float32")

    def loss(state, r_max, d_max):
        y, _ = jaxbn.batch_renorm(params, state, x, True, r_max=r_max, d_max=d_max)
        return jnp.sum(jnp.sin(y))

    gradients = jax.grad(loss, (0, 1, 2))(state, jnp.float32(1.2), jnp.float32(0.1))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


def test_one_value_per_feature_trains():
    """Its x_hat is 0, so unclipped, the output is that of evaluation."""
    params, state, x, dy = problem("float32", (1, 5))
    train = partial(compiled_step, limited(1e9, 1e9), params, state)
    y, dx, dparams, new = train(x, dy, running_variance="biased")
    assert_close(y, jaxbn.batch_norm(params, state, x, False)[0], 1e-6)
    assert (dx == 0).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((dparams, new)))


def test_a_batch_without_values_keeps_the_state():
    params, state, x, dy = problem("float32")
    no_value = jnp.zeros((1, 1, 1), bool)
    y, dx, dparams, new = compiled_step(limited(2, 1), params, state, x, dy, mask=no_value)
    assert_equal(new, state)
    assert_equal(y, jnp.broadcast_to(params["bias"], y.shape))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((dx, dparams)))


def test_transforms():
    """A schedule compiles once, and derivatives of both modes agree, of higher order too."""
    params, state, x, dy = problem("float32")

    @jax.jit
    def output(x, r_max, d_max):
        return jaxbn.batch_renorm(params, state, x, True, r_max=r_max, d_max=d_max)[0]

    for r_max, d_max in ((1.0, 0.0), (2.0, 0.5), (3.0, 5.0)):
        wanted = limited(r_max, d_max)(params, state, x, True)[0]
        assert_close(output(x, r_max, d_max), wanted, 1e-6)
    assert output._cache_size() == 1

    def loss(x):
        return jnp.sum(jnp.sin(limited(1.15, 0.8)(params, state, x, True)[0]))

    forward_over_reverse = jax.jvp(jax.grad(loss), (x,), (dy,))[1]
    reverse_over_reverse = jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), dy))(x)
    assert_close(forward_over_reverse, reverse_over_reverse, 1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"r_max": 0.5}, ValueError, "r_max must be a number of at least 1, got 0.5."),
        ({"r_max": "3"}, ValueError, "r_max must be a number of at least 1, got '3'."),
        ({"r_max": float("nan")}, ValueError, "r_max must be a number of at least 1, got nan."),
        ({"d_max": -1}, ValueError, "d_max must be a number of at least 0, got -1."),
        ({"d_max": None}, ValueError, "d_max must be a number of at least 0, got None. Batch "
         "renormalization needs both r_max and d_max."),
        ({"state": None}, TypeError, "state must be a mapping, got NoneType; batch renormalization "
         "needs running statistics."),
        ({"momentum": 2}, ValueError, "momentum must be None or lie in [0, 1], got 2. It is the "
         "weight of the old value: PyTorch's momentum is one minus it."),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, text):
    params, state, x, _ = problem("float32")
    call = {"params": params, "state": state, "x": x, "train": True, "r_max": 3, "d_max": 5}
    with raises(error, text):
        jaxbn.batch_renorm(**call | changes)


def test_traced_limits_must_be_scalars():
    params, state, x, _ = problem("float32")

    def train(r_max):
        return jaxbn.batch_renorm(params, state, x, True, r_max=r_max, d_max=5)

    with pytest.raises(ValueError, match="r_max must be a number of at least 1, got "):
        jax.jit(train)(jnp.ones(2))
