"""The layers of batch renormalization, and Keras's."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from tests.close import assert_close, assert_equal
from tests.nnx_layers import params, randomize, stats, train_step
from tests.raises import raises

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(1, 2, (8, 4, 3)), jnp.float32)
DY = jnp.asarray(RNG.normal(size=X.shape), jnp.float32)
LIMITS = {"r_max": 1.3, "d_max": 0.2}


def nnx_layer(**options) -> Any:
    return randomize(jaxbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), **options))


def variables():
    layer = nnx_layer()
    return {"params": params(layer), "batch_stats": stats(layer)}


def linen_step(layer, x=X, **call):
    def forward(params, x):
        given = {**variables(), "params": params}
        return layer.apply(given, x, use_running_average=False, mutable=["batch_stats"], **call)

    y, vjp, updates = jax.vjp(forward, variables()["params"], x, has_aux=True)
    return y, vjp(DY), updates["batch_stats"]


def function_step(**options):
    def forward(params, x):
        return jaxbn.batch_renorm(
            params, variables()["batch_stats"], x, True, **{**jaxbn.FLAX, **LIMITS, **options}
        )

    y, vjp, new = jax.vjp(forward, variables()["params"], X, has_aux=True)
    return y, vjp(DY), new


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "virtual_batch_size": 2}])
def test_layers_compute_what_the_function_does(options):
    wanted = function_step(**options)
    assert_equal(linen_step(jaxbn.linen.BatchRenorm(**LIMITS, **options)), wanted)
    layer = nnx_layer(**LIMITS, **options)
    y, dparams, dx = train_step(layer, X, DY)
    assert_equal((y, (dparams, dx), stats(layer)), wanted)


def test_variables_are_those_of_batch_norm():
    linen = [
        layer(use_running_average=False).init(jax.random.key(0), X)
        for layer in (jaxbn.linen.BatchRenorm, jaxbn.linen.BatchNorm)
    ]
    assert_equal(*linen)
    modules = [layer(3, rngs=nnx.Rngs(0)) for layer in (jaxbn.nnx.BatchRenorm, jaxbn.nnx.BatchNorm)]
    assert_equal(*(nnx.to_pure_dict(nnx.state(module)) for module in modules))


def test_frozen_and_track():
    linen = partial(jaxbn.linen.BatchRenorm, **LIMITS)
    y, gradients, new = linen_step(linen(track=False))
    assert_equal((y, gradients), linen_step(linen())[:2])
    assert_equal(new, variables()["batch_stats"])
    assert_equal(linen_step(linen(frozen=True)), linen_step(jaxbn.linen.BatchNorm(frozen=True)))


def test_limits_may_be_traced_in_linen():
    @jax.jit
    def output(r_max):
        layer = jaxbn.linen.BatchRenorm(r_max=r_max, d_max=0.2)
        return layer.apply(variables(), X, use_running_average=False, mutable=["batch_stats"])[0]

    assert_close(output(1.3), function_step()[0], 1e-6)


def test_limits_may_be_variables_in_nnx():
    limits = {
        name: nnx.Variable(jnp.array(limit)) for name, limit in (("r_max", 1.0), ("d_max", 0.0))
    }
    layer: Any = jaxbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), **limits)
    nnx.update(layer, nnx.state(nnx_layer()))

    @nnx.jit
    def step(layer, r_max, d_max):
        layer.r_max[...] = r_max
        layer.d_max[...] = d_max
        return layer(X)

    assert_close(step(layer, jnp.array(1.3), jnp.array(0.2)), function_step()[0], 1e-6)
    assert layer.r_max[...] == jnp.float32(1.3)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchRenorm])
def test_override_warms_up_without_recompiling_in_nnx(norm):
    model = nnx.Sequential(randomize(norm(3, rngs=nnx.Rngs(0))))
    compiled = []

    @nnx.jit
    def output(model):
        compiled.append("once")
        return nnx.clone(model)(X)

    for limits in ({"r_max": 1.0, "d_max": 0.0}, LIMITS):
        arrays = {name: jnp.array(limit) for name, limit in limits.items()}
        jaxbn.nnx.override(model, {"**": arrays})
        assert_close(output(model), function_step(**limits)[0], 1e-6)
    assert compiled == ["once"]
    jaxbn.nnx.override(model, {"**": LIMITS})
    # Numbers are no leaves, so these filters are exhaustive.
    nnx.split(model, nnx.Param, nnx.BatchStat)


@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm, jaxbn.linen.BatchRenorm])
def test_override_sets_the_limits_of_any_linen_layer(norm):
    layer = norm(use_running_average=False)
    apply = jaxbn.linen.override(layer.apply, {"**": LIMITS})
    y, updates = apply(variables(), X, mutable=["batch_stats"])
    wanted, _, new = function_step()
    assert_equal((y, updates["batch_stats"]), (wanted, new))


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm, jaxbn.nnx.BatchRenorm])
def test_override_sets_the_limits_of_any_nnx_layer(norm):
    layer = randomize(norm(3, rngs=nnx.Rngs(0)))
    jaxbn.nnx.override(layer, {"**": LIMITS})
    wanted, _, new = function_step()
    assert_equal((layer(X), stats(layer)), (wanted, new))


BOTH = " Batch renormalization needs both r_max and d_max."


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        ({"r_max": 2.0}, "d_max must be a number of at least 0, got None." + BOTH),
        ({"d_max": 5.0}, "r_max must be a number of at least 1, got None." + BOTH),
    ],
)
def test_override_needs_both_limits(limit, text):
    for norm in (jaxbn.linen.BatchNorm, nn.BatchNorm):
        apply = jaxbn.linen.override(norm(use_running_average=False).apply, {"**": limit})
        with raises(ValueError, text):
            apply(variables(), X, mutable=["batch_stats"])
    for norm in (jaxbn.nnx.BatchNorm, nnx.BatchNorm):
        with raises(ValueError, text):
            jaxbn.nnx.override(norm(3, rngs=nnx.Rngs(0)), {"**": limit})


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"r_max": None}, "r_max must be a number of at least 1, got None." + BOTH),
        ({"d_max": None}, "d_max must be a number of at least 0, got None." + BOTH),
        ({"r_max": 0.9}, "r_max must be a number of at least 1, got 0.9."),
        ({"d_max": -1.0}, "d_max must be a number of at least 0, got -1.0."),
    ],
)
def test_bad_limits_are_refused_before_any_step(limits, text):
    with raises(ValueError, text):
        jaxbn.linen.BatchRenorm(use_running_average=True, **limits).init(jax.random.key(0), X)
    with raises(ValueError, text):
        jaxbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0), **limits)


def test_recalibration_makes_the_correction_nothing():
    """With the exact statistics of a batch, r is 1 and d is 0, and training is evaluation."""
    layer = jaxbn.linen.BatchRenorm(**LIMITS, use_running_average=False)
    exact = recalibrate(layer, variables(), [X[:3], X[3:]])
    np.testing.assert_allclose(exact["batch_stats"]["mean"], X.mean((0, 1)), rtol=1e-5, atol=1e-6)
    y, _ = layer.apply(exact, X, mutable=["batch_stats"])
    wanted, _ = jaxbn.batch_norm(exact["params"], exact["batch_stats"], X, False, epsilon=1e-5)
    assert_close(y, wanted, 1e-5)


class TestKeras:
    """Keras keeps averages of deviations, not variances, apart from those that evaluation uses.

    So one step agrees when the averages are set, and later the averages of the means still agree.
    """

    def layer(self):
        clipping = {"rmin": 1 / 1.3, "rmax": 1.3, "dmax": 0.2}
        layer = keras.layers.BatchNormalization(renorm=True, renorm_clipping=clipping)
        layer.build(X.shape)
        state = variables()
        for name, values in (
            ("gamma", state["params"]["scale"]),
            ("beta", state["params"]["bias"]),
            ("renorm_mean", state["batch_stats"]["mean"]),
            ("renorm_stddev", self.deviation(state["batch_stats"]["var"])),
            ("moving_mean", state["batch_stats"]["mean"]),
            ("moving_stddev", self.deviation(state["batch_stats"]["var"])),
            ("moving_variance", state["batch_stats"]["var"]),
        ):
            getattr(layer, name).assign(values)
        return layer

    def deviation(self, var):
        return jnp.sqrt(var + jaxbn.KERAS["epsilon"])

    @pytest.mark.usefixtures("standard_promotion")
    def test_outputs_and_gradients_agree(self):
        layer = self.layer()
        trainable = [v.value for v in layer.trainable_variables]
        rest = [v.value for v in layer.non_trainable_variables]

        def forward(trainable, x):
            return layer.stateless_call(trainable, rest, x, training=True)[0]

        y, vjp = jax.vjp(forward, trainable, X)
        (dscale, dbias), dx = vjp(DY)
        wanted, (dparams, wanted_dx), _ = function_step(**jaxbn.KERAS)
        assert_close((y, dx), (wanted, wanted_dx), 2e-5)
        assert_close({"scale": dscale, "bias": dbias}, dparams, 2e-5)

    @pytest.mark.usefixtures("standard_promotion")
    def test_means_are_averaged_alike_and_deviations_take_the_place_of_variances(self):
        layer = self.layer()
        layer(X, training=True)
        new = function_step(**jaxbn.KERAS)[2]
        # A few roundings of numbers near one.
        np.testing.assert_allclose(layer.moving_mean.value, new["mean"], rtol=1e-6)
        old, batch = (
            self.deviation(variables()["batch_stats"]["var"]),
            self.deviation(X.var((0, 1))),
        )
        m = jaxbn.KERAS["momentum"]
        theirs = jnp.square(m * old + (1 - m) * batch) - jaxbn.KERAS["epsilon"]
        np.testing.assert_allclose(layer.moving_variance.value, theirs, rtol=1e-5)
        # The mean of variances exceeds the square of the mean of deviations.
        assert (new["var"] > theirs * 1.0005).all()
