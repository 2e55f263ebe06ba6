"""`recalibrate` gives the statistics of one training step on all data, in any batches."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import jaxbn
import jaxbn.linen
from jaxbn.calibrate import merge, recalibrate
from tests import oracle
from tests.calibration import (
    CUTS,
    TOLERANCE,
    Branches,
    Chain,
    N,
    Norm,
    Rematerialized,
    Scanned,
    cut,
    data,
    initialized,
    one_step,
)
from tests.close import assert_close


class Noisy(jaxbn.linen.BatchNorm):
    """A derived class that changes its input and output."""

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(2 * x, use_running_average, mask=mask) + 1


NETWORKS = {
    "chain": Chain,
    "branches": Branches,
    "scanned": Scanned,
    "rematerialized": Rematerialized,
    "inherited": partial(Chain, norm=Noisy),
    "other convention": partial(Chain, norm=partial(jaxbn.linen.BatchNorm, **jaxbn.EXERCISE)),
    "without parameters": partial(
        Chain, norm=partial(jaxbn.linen.BatchNorm, use_scale=False, use_bias=False)
    ),
    "Flax's": partial(Chain, norm=partial(nn.BatchNorm, use_fast_variance=False)),
    "Flax's, scanned": partial(Scanned, norm=partial(nn.BatchNorm, use_fast_variance=False)),
}

CASES = [(name, "odd last") for name in NETWORKS] + [("chain", "one"), ("chain", "tiny")]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name, sizes", CASES)
def test_is_one_step_on_all_data(name, sizes, dtype):
    with jax.enable_x64(dtype == "float64"):
        x = data(dtype)
        network, variables = initialized(NETWORKS[name], x)
        want = one_step(network, variables, x)
        got = recalibrate(network, variables, cut(x, CUTS[sizes]), train=True)
        assert_close(got["batch_stats"], want, TOLERANCE[dtype])


def test_steps_on_single_batches_differ():
    """The comparison can fail: for the mean of the batches' statistics, and after a single pass."""
    x = data()
    network, variables = initialized(Chain, x)
    want = one_step(network, variables, x)
    steps = [one_step(network, variables, part) for part in cut(x, CUTS["odd last"])]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *steps)
    merged = merge(steps, [3 * n for n in CUTS["odd last"]])
    for other, layer in ((mean, "BatchNorm_0"), (merged, "BatchNorm_1")):
        with pytest.raises(AssertionError):
            assert_close(other[layer], want[layer], 1e-2)
    assert_close(merged["BatchNorm_0"], want["BatchNorm_0"], TOLERANCE["float32"])


def test_far_from_zero():
    x = (1e4 + np.random.default_rng(0).normal(size=(1000, 8))).astype("float32")
    layer = jaxbn.linen.BatchNorm(use_running_average=False, **jaxbn.FLAX)
    # The input of a second layer depends on the last digit of the first one's mean.
    model = nn.Sequential([layer, layer.clone(parent=None)])
    variables = model.init(jax.random.key(0), x)
    got = recalibrate(model, variables, cut(x, [300, 300, 400]))["batch_stats"]
    truth = oracle.batch_norm(x, x)
    eps = np.finfo("float32").eps
    assert oracle.error(got["layers_0"]["mean"], truth.mean) < eps
    assert oracle.error(got["layers_0"]["var"], truth.var) < 4 * eps
    second = oracle.batch_norm(truth.y, x)
    assert np.abs(got["layers_1"]["mean"]).max() < 4 * eps
    assert oracle.error(got["layers_1"]["var"], second.var) < 8 * eps


def test_half_precision():
    x = jnp.asarray(data(), jnp.bfloat16)
    network = Chain(partial(jaxbn.linen.BatchNorm, dtype=jnp.bfloat16))
    variables = network.init(jax.random.key(0), x, train=False)
    want = one_step(network, variables, x)
    got = recalibrate(network, variables, [x[:50], x[50:]], train=True)["batch_stats"]
    # Outputs between two bfloat16 numbers may round either way.
    assert_close(got, want, 1e-3)


def test_only_statistics_differ():
    x = data()
    network, variables = initialized(Chain, x)
    variables = {**variables, "cache": {"seen": jnp.ones(3)}}
    before = jax.tree.map(np.array, variables)
    got = recalibrate(network, variables, cut(x, CUTS["two"]), train=True, mutable=["batch_stats"])
    assert got["params"] is variables["params"] and got["cache"] is variables["cache"]
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    frozen = recalibrate(network, freeze(variables), cut(x, CUTS["two"]), train=True)
    assert jax.tree.structure(frozen) == jax.tree.structure(freeze(variables))
    jax.tree.map(np.testing.assert_array_equal, frozen.unfreeze(), got)


def test_count_is_unchanged():
    layer = Norm(momentum=None, use_running_average=False)
    x = data()
    variables: Any = layer.init(jax.random.key(0), x)
    variables["batch_stats"]["count"] += 7
    got = recalibrate(layer, variables, iter([x[:3], x[3:]]))["batch_stats"]
    assert got["count"] == 7
    np.testing.assert_allclose(got["mean"], x.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(got["var"], x.var((0, 1), ddof=1), rtol=1e-6)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, mask, train):
        x = Norm(use_running_average=not train)(x, mask=mask)
        return Norm(use_running_average=not train)(nn.tanh(x), mask=mask)


@pytest.mark.parametrize("form", [lambda x, m: (x, m), lambda x, m: {"x": x, "mask": m}])
def test_masks(form):
    x, mask = data(), np.random.default_rng(1).random((N, 3, 1)) < 0.7
    mask[:20] = False
    variables = TwoInputs().init(jax.random.key(0), x, mask, train=False)
    hidden = np.where(mask, x, np.nan)
    pieces = zip(cut(hidden, [20, 50, 31]), cut(mask, [20, 50, 31]), strict=True)
    got = recalibrate(TwoInputs(), variables, [form(*piece) for piece in pieces], train=True)
    wanted = TwoInputs().init(jax.random.key(0), x[mask[..., 0]], None, train=False)
    want = recalibrate(TwoInputs(), wanted, [(x[mask[..., 0]], None)], train=True)
    assert_close(got["batch_stats"], want["batch_stats"], TOLERANCE["float32"])


def test_features_without_values_keep_their_statistics():
    x, mask = data(shape=(10, 3)), np.ones((10, 3), bool)
    mask[:, 1], mask[1:, 2] = False, False
    variables = TwoInputs().init(jax.random.key(0), x, mask, train=False)
    got = recalibrate(TwoInputs(), variables, [(x, mask)], train=True)
    stats = got["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], [x[:, 0].mean(), 0, x[0, 2]], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [x[:, 0].var(ddof=1), 1, 1], rtol=1e-6)


class CalledTwice(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = Norm(use_running_average=not train)
        return norm(3 * nn.tanh(norm(x)) + 1)


def test_a_layer_called_twice_merges_both_calls():
    x = data()
    variables = CalledTwice().init(jax.random.key(0), x, train=False)
    got = recalibrate(CalledTwice(), variables, cut(x, CUTS["odd last"]), train=True)
    first = x.astype("float64")
    second = (first - first.mean((0, 1))) / np.sqrt(first.var((0, 1)) + 1e-5)
    both = np.concatenate([first, 3 * np.tanh(second) + 1])
    np.testing.assert_allclose(got["batch_stats"]["BatchNorm_0"]["mean"], both.mean((0, 1)), 1e-5)
    var = both.var((0, 1), ddof=1)
    np.testing.assert_allclose(got["batch_stats"]["BatchNorm_0"]["var"], var, 1e-5)


class PartlyFrozen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = Norm(use_running_average=True)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return Norm(use_running_average=not train)(x)


def test_modes():
    """Frozen layers are kept if another layer trains; in evaluation mode, there is no dropout."""
    x = data()
    variables = PartlyFrozen().init(jax.random.key(0), x, train=False)
    rngs = {"dropout": jax.random.key(1)}
    stats = recalibrate(PartlyFrozen(), variables, [x], train=True, rngs=rngs)["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, *(s["BatchNorm_0"] for s in
                                                  (stats, variables["batch_stats"])))  # fmt: skip
    dropped: Any = PartlyFrozen().apply(
        variables, x, train=True, rngs=rngs, mutable=["batch_stats"]
    )[1]
    step_mean = dropped["batch_stats"]["BatchNorm_1"]["mean"]
    np.testing.assert_allclose(stats["BatchNorm_1"]["mean"], 10 * step_mean, rtol=1e-4, atol=1e-6)
    stats = recalibrate(PartlyFrozen(), variables, [x], train=False)["batch_stats"]
    np.testing.assert_allclose(stats["BatchNorm_0"]["mean"], x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(stats["BatchNorm_1"]["var"], 1, rtol=5e-3)


def test_statistics_across_devices_need_no_axis():
    layer = jaxbn.linen.BatchNorm(use_running_average=False, axis_name="devices", axis=1,
                                  virtual_batch_size=4)  # fmt: skip
    x = data()
    got = recalibrate(layer, layer.init(jax.random.key(0), x), [x])["batch_stats"]
    np.testing.assert_allclose(got["mean"], x.mean((0, 2)), rtol=1e-5)


class Shuffled:
    """A data loader: each pass has another order."""

    def __init__(self, x):
        self.x, self.rng = x, np.random.default_rng(0)

    def __iter__(self):
        return iter(cut(self.rng.permutation(self.x), CUTS["odd last"]))


def test_batches_of_another_order_in_each_pass():
    x = data()
    network, variables = initialized(Chain, x)
    want = one_step(network, variables, x)
    got = recalibrate(network, variables, Shuffled(x), train=True)
    assert_close(got["batch_stats"], want, TOLERANCE["float32"])


@pytest.mark.parametrize("layer", [jaxbn.linen.BatchNorm, nn.BatchNorm])
def test_inputs_and_masks_of_integers(layer):
    x, model = np.arange(12).reshape(4, 3), layer(use_running_average=False)
    variables = model.init(jax.random.key(0), x)
    got = recalibrate(model, variables, [x[:3], x[3:]], mask=np.array([1, 0, 1]))["batch_stats"]
    np.testing.assert_allclose(got["mean"], [4.5, 0, 6.5], rtol=1e-6)
    np.testing.assert_allclose(got["var"], [11.25, 1, 11.25], rtol=1e-6)
