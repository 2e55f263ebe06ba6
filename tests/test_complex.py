"""Complex numbers: the mean is complex, and the variance, of `|x - mean|`, is real."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxbn
from tests import close, forms
from tests.raises import raises

# Float64 rounds at 1e-16, and some hundred values of at most ten are summed.
TOLERANCE = 1e-12
SHAPE = (8, 5, 3)
MASK = (np.arange(8) % 3 > 0)[:, None, None]
EPSILON, MOMENTUM = 1e-5, 0.9


def assert_close(got, wanted, tolerance=TOLERANCE):
    """Compare real and imaginary parts, and dtypes."""
    assert [v.dtype for v in jax.tree.leaves(got)] == [v.dtype for v in jax.tree.leaves(wanted)]
    parts = jax.tree.map(lambda v: np.stack([np.real(v), np.imag(v)]), (got, wanted))
    close.assert_close(*parts, tolerance)


def numbers(rng, shape, mean=2 - 1j):
    """Return complex numbers whose parts differ in deviation and are correlated."""
    a, b = rng.normal(size=(2, *shape))
    return jnp.asarray(mean + a + 1j * (0.5 * a + 2 * b))


def problem(rng, shape=SHAPE):
    """Return complex parameters and statistics, a batch and a cotangent."""
    features = shape[-1:]
    params = {"scale": numbers(rng, features), "bias": numbers(rng, features)}
    state = {"mean": numbers(rng, features), "var": jnp.asarray(rng.uniform(1, 9, features))}
    return params, state, numbers(rng, shape), numbers(rng, shape)


def reference(params, state, x, train, *, mask=None, ddof=0, running_ddof=1):
    """Return what the paper's equations give in plain JAX."""
    axes = tuple(range(x.ndim - 1))
    mask = jnp.ones(x.shape, bool) if mask is None else jnp.broadcast_to(mask, x.shape)
    mean, var, new = state["mean"], state["var"], state
    if train:
        n = mask.sum(axes)
        mean = jnp.where(mask, x, 0).sum(axes) / n
        square = jnp.where(mask, jnp.abs(x - mean) ** 2, 0).sum(axes)
        var = square / (n - ddof)
        batch = {"mean": mean, "var": square / (n - running_ddof)}
        new = {k: MOMENTUM * state[k] + (1 - MOMENTUM) * batch[k] for k in batch}
    y = params["scale"] * (x - mean) / jnp.sqrt(var + EPSILON) + params["bias"]
    return jnp.where(mask, y, params["bias"]), new


@partial(jax.jit, static_argnums=0)
def both_ways(step, params, x, dy):
    y, vjp, new = jax.vjp(step, params, x, has_aux=True)
    return y, new, vjp(dy)


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("estimators", [("biased", "unbiased"), ("unbiased", "biased")])
def test_equals_the_equations_forward_and_backward(rng, train, mask, estimators):
    params, state, x, dy = problem(rng)
    normalizes, is_tracked = estimators
    options = {"batch_variance": normalizes, "running_variance": is_tracked}
    ddofs = {"ddof": normalizes == "unbiased", "running_ddof": is_tracked == "unbiased"}

    def ours(params, x):
        return jaxbn.batch_norm(params, state, x, train, mask=mask, **options)

    def wanted(params, x):
        return reference(params, state, x, train, mask=mask, **ddofs)

    assert_close(both_ways(ours, params, x, dy), both_ways(wanted, params, x, dy))


@pytest.mark.usefixtures("x64")
def test_real_parameters_and_statistics(rng):
    """A real scale and bias stay real, and so do their gradients; a real mean becomes complex."""
    params, state, x, dy = problem(rng)
    real = {name: leaf.real for name, leaf in params.items()}
    whole = {name: leaf.astype(complex) for name, leaf in real.items()}
    initial = {**state, "mean": state["mean"].real}

    def step(state, params, x):
        return jaxbn.batch_norm(params, state, x, True)

    y, new, (dparams, dx) = both_ways(partial(step, initial), real, x, dy)
    initial["mean"] = initial["mean"].astype(complex)
    wanted_y, wanted_new, (wanted_dparams, wanted_dx) = both_ways(
        partial(step, initial), whole, x, dy
    )
    assert_close((y, new, dx), (wanted_y, wanted_new, wanted_dx))
    assert_close(dparams, {name: leaf.real for name, leaf in wanted_dparams.items()})


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_complex_parameters_make_the_output_of_a_real_batch_complex(rng):
    params, state, x, dy = problem(rng)
    state = {**state, "mean": state["mean"].real}
    results = [
        both_ways(partial(step, state), params, x.real, dy)
        for step in (
            lambda state, params, x: jaxbn.batch_norm(params, state, x, True),
            lambda state, params, x: reference(params, state, x, True),
        )
    ]
    assert_close(*results)
    y, new, _ = results[0]
    assert (y.dtype, new["mean"].dtype) == (jnp.complex128, jnp.float64)
    y, _ = jaxbn.batch_norm(params, None, x.real.astype("bfloat16"), True)
    assert y.dtype == jnp.complex64


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("platform", forms.FORMS)
def test_accurate_far_from_zero_in_every_form(rng, platform):
    """The largest error is 1e-6 of the largest value, as for real numbers."""
    far = np.asarray([0, 1e4, 300 - 2e4j])
    x = np.asarray(numbers(rng, (64, 7, 3), mean=far)).astype(np.complex64)
    params, state = jaxbn.init(x.shape, param_dtype="complex64")
    dy = np.asarray(numbers(rng, x.shape)).astype(np.complex64)

    def step(params, x):
        return jaxbn.batch_norm(params, state, x, True)

    got = forms.jit(partial(both_ways.__wrapped__, step), platform)(params, x, dy)
    with jax.enable_x64(True):
        params, x, dy, state = jax.tree.map(
            lambda v: jnp.asarray(v, jnp.promote_types(v.dtype, np.float64)), (params, x, dy, state)
        )
        wanted = both_ways(lambda params, x: reference(params, state, x, True), params, x, dy)
    for value, exact in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.abs(value - np.asarray(exact)).max() <= 1e-6 * np.abs(exact).max()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [2, 3])
def test_ghost_batches(rng, size):
    params, state, x, _ = problem(rng)
    y, new = jaxbn.batch_norm(params, state, x, True, virtual_batch_size=size)
    groups = [
        jaxbn.batch_norm(params, state, x[i : i + size], True) for i in range(0, len(x), size)
    ]
    assert_close(y, jnp.concatenate([y for y, _ in groups]))
    assert_close(new, jax.tree.map(lambda *v: sum(v) / len(v), *(state for _, state in groups)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [None, 2])
def test_devices_equal_one(rng, size):
    """Two devices with unequal numbers of values, by `vmap` and by `shard_map`."""
    params, state, x, dy = problem(rng)
    options = {"virtual_batch_size": size}

    def step(params, x, mask, **more):
        return jaxbn.batch_norm(params, state, x, True, mask=mask, **options, **more)

    wanted = both_ways(partial(step, mask=MASK), params, x, dy)
    mapped = {
        "vmap": lambda params, x, mask: jax.tree.map(
            lambda got, like: got.reshape(like.shape) if got.ndim > 2 else got[0],
            jax.vmap(partial(step, axis_name="i"), (None, 0, 0), axis_name="i")(
                params, x.reshape(2, 4, 5, 3), mask.reshape(2, 4, 1, 1)
            ),
            (x, state),
        ),
        "shard_map": jax.shard_map(
            partial(step, axis_name="i"),
            mesh=jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ("i",)),
            in_specs=(P(), P("i"), P("i")),
            out_specs=(P("i"), P()),
        ),
    }
    for function in mapped.values():
        got = both_ways(lambda p, x, f=function: f(p, x, jnp.asarray(MASK)), params, x, dy)
        assert_close(got, wanted)


def test_state_keeps_its_dtypes_in_a_scan(rng):
    x = numbers(rng, (4, *SHAPE)).astype("complex64")
    params, state = jaxbn.init(x.shape, param_dtype="complex64", track_count=True)

    def step(state, x):
        y, state = jaxbn.batch_norm(
            params, state, x, True, momentum=None, running_variance="biased"
        )
        return state, y

    new, _ = jax.lax.scan(step, state, x)
    dtypes = {name: leaf.dtype for name, leaf in new.items()}
    assert dtypes == {"mean": jnp.complex64, "var": jnp.float32, "count": jnp.int32}
    batches = np.asarray(x, np.complex128)
    # Averages of four batches in float32, of values of at most ten.
    np.testing.assert_allclose(new["mean"], batches.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(new["var"], batches.var((1, 2)).mean(0), rtol=1e-6)


def test_values_under_the_mask_may_be_anything(rng):
    params, state = jaxbn.init(SHAPE, param_dtype="complex64")
    x = np.asarray(numbers(rng, SHAPE)).astype(np.complex64)
    poisoned = np.where(MASK, x, np.nan + 1j * np.inf)
    got, wanted = (
        both_ways(
            lambda params, x: jaxbn.batch_norm(params, state, x, True, mask=MASK),
            params,
            jnp.asarray(value, "complex64"),
            jnp.ones(SHAPE, "complex64"),
        )
        for value in (poisoned, np.where(MASK, x, 0))
    )
    close.assert_equal(got, wanted)


def test_errors(rng):
    x = jnp.ones(SHAPE, "complex64")
    params, state = jaxbn.init(SHAPE, param_dtype="complex64")
    real, _ = jaxbn.init(SHAPE)
    with raises(
        TypeError, "state['mean'] must be real where x is, got complex64 for x of float32."
    ):
        jaxbn.batch_norm(real, state, x.real, True)
    with raises(TypeError, "dtype must be complex if x is, got float32."):
        jaxbn.batch_norm(real, state, x, True, dtype="float32")
    with raises(TypeError, "dtype must be complex if params['scale'] is, got float32."):
        jaxbn.batch_norm(params, None, x.real, True, dtype="float32")
    with raises(TypeError, "state['var'] must be an array of a floating dtype, got complex64."):
        jaxbn.batch_norm(params, {**state, "var": state["mean"]}, x, True)
    with raises(TypeError, "x must be of a real floating dtype, got complex64."):
        jaxbn.batch_renorm(real, state, x, True, r_max=1, d_max=0)
