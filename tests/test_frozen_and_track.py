"""`frozen` and `track`, which keep training from updating the running statistics."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
from jaxbn.calibrate import recalibrate
from tests.close import assert_equal
from tests.nnx_layers import arrays, ours, params, randomize, stats, train_step
from tests.raises import raises

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(3, 2, (8, 3)), jnp.float32)
DY = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)


def linen(**options) -> Any:
    return jaxbn.linen.BatchNorm(**options)


def variables():
    layer = randomize(ours(3))
    return {"params": params(layer), "batch_stats": stats(layer)}


def linen_step(layer, **call):
    """Return output, new statistics and gradients of a step."""

    def forward(params, x):
        variables_with = {**variables(), "params": params}
        return layer.apply(variables_with, x, mutable=["batch_stats"], **call)

    y, vjp, updates = jax.vjp(forward, variables()["params"], X, has_aux=True)
    return y, updates["batch_stats"], vjp(DY)


class TestFrozen:
    @pytest.mark.parametrize(
        ("options", "call"),
        [
            ({"use_running_average": False}, {}),
            ({"use_running_average": True}, {}),
            ({}, {"use_running_average": False}),
            ({}, {}),
        ],
    )
    def test_linen_is_in_evaluation_whatever_the_mode(self, options, call):
        got = linen_step(linen(frozen=True, **options), **call)
        assert_equal(got, linen_step(linen(use_running_average=True)))
        assert_equal(got[1], variables()["batch_stats"])

    @pytest.mark.parametrize("mode", [False, True, None])
    def test_nnx_is_in_evaluation_whatever_the_mode(self, mode):
        wanted = train_step(randomize(ours(3)), X, DY, use_running_average=True)
        layer = randomize(ours(3, frozen=True, use_running_average=mode))
        before = stats(layer)
        assert_equal(train_step(layer, X, DY), wanted)
        layer.train()
        assert_equal(train_step(layer, X, DY), wanted)
        assert_equal(train_step(layer, X, DY, use_running_average=False), wanted)
        assert_equal(stats(layer), before)

    def test_initialization_is_as_usual_and_takes_one_example(self):
        wanted = linen(use_running_average=False).init(jax.random.key(0), X)
        assert_equal(linen(frozen=True).init(jax.random.key(0), X[:1]), wanted)

    def test_count_stays(self):
        layer = ours(3, momentum=None, frozen=True)
        layer(X)
        assert layer.count[...] == 0

    def test_recalibration_keeps_frozen_layers(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, train):
                x = linen(frozen=True, name="frozen")(x, use_running_average=not train)
                return linen(name="free")(2 * x, use_running_average=not train)

        net = Net()
        old = {"free": variables()["batch_stats"], "frozen": variables()["batch_stats"]}
        given = {"params": net.init(jax.random.key(0), X, False)["params"], "batch_stats": old}
        x_hat = (X - old["frozen"]["mean"][None]) / jnp.sqrt(old["frozen"]["var"][None] + 1e-5)
        for train in (False, True):
            new = recalibrate(net, given, [X[:3], X[3:]], train=train)["batch_stats"]
            assert_equal(new["frozen"], old["frozen"])
            np.testing.assert_allclose(new["free"]["mean"], 2 * x_hat.mean(0), rtol=1e-5)

    def test_a_model_with_only_frozen_layers_cannot_be_recalibrated(self):
        layer = ours(3, frozen=True)
        with raises(ValueError, "model must call a batch norm of jaxbn.linen, flax.linen, "
                    "jaxbn.nnx or flax.nnx that is not frozen, got a model that calls "
                    "none."):  # fmt: skip
            recalibrate(layer, nnx.state(layer), [X])


class TestTrack:
    def test_linen_normalizes_as_in_training_and_moves_nothing(self):
        y, new, gradients = linen_step(linen(track=False, use_running_average=False))
        wanted, moved, wanted_gradients = linen_step(linen(use_running_average=False))
        assert_equal((y, gradients), (wanted, wanted_gradients))
        assert_equal(new, variables()["batch_stats"])
        assert not np.allclose(moved["mean"], new["mean"])

    def test_nnx_normalizes_as_in_training_and_moves_nothing(self):
        layer, tracking = randomize(ours(3, track=False)), randomize(ours(3))
        before = stats(layer)
        assert_equal(train_step(layer, X, DY), train_step(tracking, X, DY))
        assert_equal(stats(layer), before)
        assert not np.allclose(stats(tracking)["mean"], before["mean"])

    def test_evaluation_uses_the_running_statistics(self):
        wanted = linen_step(linen(use_running_average=True))
        assert_equal(linen_step(linen(track=False, use_running_average=True)), wanted)

    def test_statistics_need_not_be_mutable(self):
        y = linen(track=False).apply(variables(), X, use_running_average=False)
        assert_equal(y, linen_step(linen(use_running_average=False))[0])

    def test_count_stays(self):
        layer = ours(3, momentum=None, track=False)
        layer(X)
        assert arrays(nnx.state(layer, nnx.BatchStat))["count"] == 0

    def test_frozen_wins(self):
        wanted = linen_step(linen(use_running_average=True))
        assert_equal(linen_step(linen(track=False, frozen=True)), wanted)
