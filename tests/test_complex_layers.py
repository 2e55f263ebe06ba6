"""Complex numbers in the layers, as Flax's layers take them, and in the tools."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.calibrate
import jaxbn.health
import jaxbn.linen
import jaxbn.nnx
from tests.drop_in import TOLERANCE
from tests.raises import raises

KEY = jax.random.key(0)
PARAM_DTYPES = ["float32", "complex64"]

pytestmark = pytest.mark.usefixtures("standard_promotion")


def batch(seed=0, n=8):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n, 5, 3))
    return (2 - 1j + a + 1j * (0.5 * a + 2 * b)).astype(np.complex64)


def assert_close(got, wanted):
    """Compare leaves and their dtypes."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, TOLERANCE, TOLERANCE)


def initializers(param_dtype):
    value = 0.5 + 2j if param_dtype == "complex64" else 0.5
    constant = nn.initializers.constant(value, param_dtype)
    return {"param_dtype": param_dtype, "scale_init": constant, "bias_init": constant}


def linen_steps(layer, x, count):
    """Return outputs and statistics of two training steps and of an evaluation.

    Only the first `count` examples are not masked out in training, and only theirs are returned.
    """
    variables = layer.init(KEY, x, False)
    mask = None if count == len(x) else np.arange(len(x))[:, None, None] < count
    results = []
    for k in range(2):
        y, updates = layer.apply(variables, x + k, False, mask=mask, mutable=["batch_stats"])
        variables = {**variables, **updates}
        results.append((y[:count], updates))
    return [*results, layer.apply(variables, x, True)]


@pytest.mark.parametrize("param_dtype", PARAM_DTYPES)
@pytest.mark.parametrize("x", [batch(), batch().real], ids=["complex", "real"])
@pytest.mark.parametrize("count", [8, 5])
def test_linen_computes_what_flax_does(param_dtype, x, count):
    options = {"momentum": 0.9, **initializers(param_dtype)}
    got, wanted = (
        linen_steps(norm(**options), x, count) for norm in (jaxbn.linen.BatchNorm, nn.BatchNorm)
    )
    assert_close(got, wanted)
    assert np.iscomplexobj(got[-1]) == (np.iscomplexobj(x) or param_dtype == "complex64")


def test_the_mean_is_complex_from_the_start():
    """So the variables keep their dtypes in `lax.scan` over training steps."""
    layer, x = jaxbn.linen.BatchNorm(use_running_average=False), batch()
    variables = layer.init(KEY, x)
    _, updates = layer.apply(variables, x, mutable=["batch_stats"])
    for stats in (variables["batch_stats"], updates["batch_stats"]):
        assert {k: v.dtype for k, v in stats.items()} == {"mean": jnp.complex64, "var": jnp.float32}


@pytest.mark.parametrize("param_dtype", PARAM_DTYPES)
def test_nnx_computes_what_flax_does(param_dtype):
    """Flax's layer drops the imaginary part of the running mean, so it evaluates incorrectly."""
    options = {"momentum": 0.9, **initializers(param_dtype), "rngs": nnx.Rngs(0)}
    ours, theirs = jaxbn.nnx.BatchNorm(3, **options), nnx.BatchNorm(3, **options)
    x = batch()
    for k in range(2):
        theirs_y = _without_complex_warnings(theirs, x + k)
        assert_close(ours(x + k), theirs_y)
    assert_close(ours.var[...], theirs.var[...])
    assert_close(ours.mean[...].real, theirs.mean[...])
    wanted = 0.1 * (x + 1).mean((0, 1)) + 0.09 * x.mean((0, 1))
    np.testing.assert_allclose(ours.mean[...], wanted, TOLERANCE)
    ours.eval()
    wanted = (x - ours.mean[...]) / np.sqrt(ours.var[...] + 1e-5) * ours.scale[...] + ours.bias[...]
    assert_close(ours(x), wanted)


def _without_complex_warnings(layer, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return layer(x)


@pytest.mark.parametrize("x", [batch(), batch().real], ids=["complex", "real"])
def test_nnx_keeps_the_variance_real_in_both_modes(x):
    layer = jaxbn.nnx.BatchNorm(3, **initializers("complex64"), rngs=nnx.Rngs(0))
    y = layer(x)
    layer.eval()
    assert y.dtype == layer(x).dtype == jnp.complex64
    assert layer.var[...].dtype == jnp.float32
    gradient = nnx.grad(lambda layer: jnp.abs(layer(x)).sum())(layer)
    assert gradient["scale"][...].dtype == jnp.complex64


class TestTools:
    batches = (batch(0, 8), batch(1, 4))
    everything = np.concatenate(batches)

    def test_recalibrate_linen(self):
        layer = jaxbn.linen.BatchNorm(running_variance="unbiased")
        variables = layer.init(KEY, self.batches[0], False)
        new = jaxbn.calibrate.recalibrate(layer, variables, self.batches, use_running_average=False)
        self.check(new["batch_stats"])

    def test_recalibrate_nnx(self):
        layer = jaxbn.nnx.BatchNorm(3, running_variance="unbiased", rngs=nnx.Rngs(0))
        state = jaxbn.calibrate.recalibrate(layer, nnx.state(layer, nnx.BatchStat), self.batches)
        self.check({name: state[name][...] for name in ("mean", "var")})

    def test_merge(self):
        states = [{"mean": x.mean((0, 1)), "var": x.var((0, 1), ddof=1)} for x in self.batches]
        self.check(jaxbn.calibrate.merge(states, [40, 20]))

    def check(self, state):
        exact = self.everything.astype(np.complex128)
        wanted = {"mean": exact.mean((0, 1)), "var": exact.var((0, 1), ddof=1)}
        assert (state["mean"].dtype, state["var"].dtype) == (np.complex64, np.float32)
        for name, value in wanted.items():
            np.testing.assert_allclose(state[name], value, TOLERANCE)

    def test_health_is_not_checked(self):
        layer = jaxbn.linen.BatchNorm()
        variables = layer.init(KEY, self.batches[0], False)
        with raises(
            TypeError,
            "variables must have real running means: the health of batch norms of complex numbers "
            "cannot be checked, got a mean of complex64.",
        ):
            jaxbn.health.check(layer, variables, self.batches, use_running_average=False)
