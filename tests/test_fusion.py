"""The forms for different compilers compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import _fusion
from tests import forms

every_form = pytest.mark.parametrize("form", forms.FORMS)


def step(x, dy):
    params, state = jaxbn.init(x.shape)
    y, vjp = jax.vjp(lambda p, x: jaxbn.batch_norm(p, state, x, True)[0], params, x)
    return y, vjp(dy)


def program(form):
    """Return the step as it is traced in a form."""
    x = jnp.ones((64, 3))
    with forms.of(form):
        return str(jax.make_jaxpr(step)(x, x))


def test_the_helper_runs_the_forms_that_it_names():
    """Only CPUs get a loop and the barriers of readings, and only GPUs complex sums."""
    seen = {}
    for form in [*forms.FORMS, "rocm", "anything else"]:
        text = program(form)
        # One barrier, around the two floats of the mean, is everywhere.
        has_more_barriers = text.count("optimization_barrier") > 1
        seen[form] = ("while" in text, has_more_barriers, "complex" in text)
    assert seen == {
        "cpu": (True, True, False),
        "cuda": (False, False, True),
        "rocm": (False, False, True),
        "tpu": (False, False, False),
        "anything else": (False, False, False),
    }


def test_the_form_of_this_machine_is_what_users_get(rng):
    x, dy = rng.normal(3, 1, size=(2, 64, 3)).astype(np.float32)
    plain = jax.jit(step)(x, dy)
    own = forms.jit(step, jax.default_backend())(x, dy)
    jax.tree.map(np.testing.assert_array_equal, plain, own)


def test_the_helper_leaves_no_trace():
    """A trace in a form is not reused outside of it."""
    real = _fusion.by_platform
    assert "complex" in program("cuda")
    assert _fusion.by_platform is real
    x = jnp.ones((64, 3))
    assert "while" in str(jax.make_jaxpr(step)(x, x))
    with pytest.raises(ZeroDivisionError), forms.of("tpu"):
        raise ZeroDivisionError
    assert _fusion.by_platform is real


@every_form
@pytest.mark.parametrize("shape", [(64, 1), (1, 5), (64, 5)])
def test_a_line_and_its_transpose(x64, form, shape, rng):
    """They agree in float64, except for its last digits."""
    x, dy = rng.normal(size=(2, 64, 5))
    shift = rng.normal(size=(1, 5))
    slope, offset = rng.normal(size=(2, *shape))

    def both(x, shift, slope, offset, dy):
        def line(slope, offset):
            return _fusion.line(x.dtype, x, shift, slope, offset)

        y, vjp = jax.vjp(line, slope, offset)
        return y, vjp(dy)

    y, (dslope, doffset) = forms.jit(both, form)(x, shift, slope, offset, dy)
    np.testing.assert_allclose(y, (x - shift) * slope + offset, rtol=1e-12, atol=1e-12)
    axes = tuple(a for a in range(2) if shape[a] == 1)
    expected = (dy * (x - shift)).sum(axes, keepdims=True), dy.sum(axes, keepdims=True)
    np.testing.assert_allclose(dslope, expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(doffset, expected[1], rtol=1e-12, atol=1e-12)


@every_form
def test_own_reading_is_the_identity_and_so_is_its_derivative(form, rng):
    x, dx = (jnp.asarray(v, jnp.bfloat16).astype(jnp.float32) for v in rng.normal(size=(2, 8, 3)))
    mean, dmean = (jnp.asarray(v, jnp.float32) for v in rng.normal(size=(2, 1, 3)))

    def jvp(x, mean, dx, dmean):
        return jax.jvp(lambda *a: _fusion.own_reading("bfloat16", *a), (x, mean), (dx, dmean))

    own, tangents = forms.jit(jvp, form)(x, mean, dx, dmean)
    jax.tree.map(np.testing.assert_array_equal, own, (x, mean))
    jax.tree.map(np.testing.assert_array_equal, tangents, (dx, dmean))


@every_form
@pytest.mark.parametrize("check", [True, False])
def test_values_that_vary_over_devices_and_values_that_do_not(form, check, rng):
    """In `shard_map`, the values of all forms must vary over the same devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = rng.normal(size=(16, 3)).astype(np.float32)
    P = jax.sharding.PartitionSpec

    def own(x, shift):
        return _fusion.line(x.dtype, x, shift, jnp.full((1, 3), 2.0), jnp.ones((1, 3)))

    mapped = jax.shard_map(
        own, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=check
    )
    y = forms.jit(mapped, form)(x, np.full((1, 3), 0.5, np.float32))
    np.testing.assert_allclose(y, (x - 0.5) * 2 + 1, rtol=1e-6, atol=1e-6)
