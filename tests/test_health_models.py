"""`check` on models, data and variables of many kinds."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.calibrate import recalibrate
from jaxbn.health import check
from tests.calibration import Scanned
from tests.health import NNX, Linen, Model, codes, data, exact, shuffled
from tests.raises import raises

Norm = jaxbn.linen.BatchNorm


def test_nothing_changes():
    network = NNX()
    state, graphdef = nnx.to_pure_dict(nnx.state(network.model)), nnx.graphdef(network.model)
    before = jax.tree.map(np.array, state)
    network.check(data())
    after = nnx.to_pure_dict(nnx.state(network.model))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert nnx.graphdef(network.model) == graphdef


def test_modes_of_a_linen_model():
    network = Linen()
    in_evaluation, in_training = (network.check(data(), train=train) for train in (False, True))
    assert in_training.findings == in_evaluation.findings
    assert in_training.layers == in_evaluation.layers


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: (x,), lambda x: (x, False), lambda x: {"x": x, "train": True}]
)
def test_forms_of_batches(form):
    network = Linen()
    assert network.check([form(x) for x in data()]).layers == network.check(data()).layers
    assert network.check(form(x) for x in data()).layers == network.check(data()).layers


@pytest.mark.parametrize("value, found", [(2.0, []), (np.nan, [("BatchNorm_0", "non-finite")])])
def test_of_layers_in_evaluation_mode_only_the_values_are_checked(value, found):
    def function(norm, x):
        return norm(name="trained")(Norm(True)(x))

    x = shuffled(64, batches=1)
    model = Model(function, train=True)
    variables = model.init(jax.random.key(0), x[0])
    variables["batch_stats"]["BatchNorm_0"]["var"] *= value
    if not found:
        variables = recalibrate(model, variables, x)
    report = check(model, variables, x)
    assert codes(report) == found
    assert report.layers[0][:2] == ("BatchNorm_0", 0) and np.isnan(report.layers[0].change)
    # NaN in the input of the others leaves nothing to compare.
    assert [row.values for row in report.layers[1:]] == ([] if found else [64])


@pytest.mark.parametrize("counted, found", [(16, []), (15, [("BatchNorm_0", "few-values")])])
def test_masked_out_values_are_not_counted(counted, found):
    x = shuffled(64, batches=1)[0]
    mask = (np.arange(64) < counted)[:, None]
    model = Model(lambda norm, x, mask=None: norm()(x, mask=mask))
    variables = model.init(jax.random.key(0), x)
    variables = recalibrate(model, variables, [(x, mask)])
    assert codes(check(model, variables, [(x, mask)])) == found
    # A smaller last batch is not a fault.
    assert codes(check(model, variables, [(x[:20], mask[:20]), (x[20:], mask[20:])])) == found


@pytest.mark.parametrize("size, found", [(4, []), (2, [("BatchNorm_0", "few-values")])])
def test_groups_of_few_values(size, found):
    """Each example has five values per feature."""
    x = np.random.default_rng(0).normal(size=(32, 5, 4)).astype("float32")

    def function(norm, x):
        return norm(virtual_batch_size=size)(x)

    assert codes(check(*exact(function, [x]), [x])) == found


def test_dropout():
    def function(norm, x, drop=False):
        return norm()(nn.Dropout(0.5, deterministic=not drop)(norm()(x)))

    model, _ = exact(function, shuffled())
    run = {"drop": True, "rngs": {"dropout": jax.random.key(1)}}
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, data()[0])
    variables = recalibrate(model, variables, shuffled(), **run)
    assert check(model, variables, shuffled(), **run).output_change == pytest.approx(0, abs=1e-5)
    # Without dropout, the second norm's input has half of the variance.
    report = check(model, variables, shuffled(), drop=False)
    assert report.layers[1].variance == pytest.approx(2, rel=0.2)


def test_layers_of_a_scan():
    # Each of its layers has as many values as the data.
    x = [np.stack([x, x + 1, x - 1], 1) for x in shuffled()]
    model = Scanned()
    variables = model.init(jax.random.key(0), x[0], train=False)
    (path,) = {finding.path for finding in check(model, variables, x, train=False).findings}
    assert path == "ScanBlock_0/BatchNorm_0"
    variables = recalibrate(model, variables, x, train=False)
    report = check(model, variables, x, train=False)
    assert report.ok
    assert report.layers[0][:2] == (path, 3 * 640)


@nnx.jit
def compiled(norms, x):
    return norms[0](nnx.relu(norms[1](x)))


class JitNNX(nnx.Module):
    def __init__(self):
        self.norms = nnx.List([jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)) for _ in range(2)])

    def __call__(self, x):
        return compiled(self.norms, x)


class JitLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Norm(True, name="norms/0")(nn.relu(Norm(True, name="norms/1")(x)))


def test_functions_that_were_compiled_before():
    x = shuffled()
    model = nn.jit(JitLinen)()
    variables = model.init(jax.random.key(0), x[0])
    model.apply(variables, x[0])
    nnx_model = JitNNX()
    nnx_model.eval()
    nnx_model(x[0])
    for _ in range(2):
        for report in (check(model, variables, x), check(nnx_model, None, x)):
            assert [row.path for row in report.layers] == ["norms/1", "norms/0"]
            assert {code for _, code in codes(report)} == {"never-updated"}


def test_bad_calls():
    network, x = Linen(), data()
    with raises(
        TypeError,
        "variables must be given, got None: only a flax.nnx.Module holds its own variables, and "
        "model is a LinenNet.",
    ):
        check(network.model, None, x)
    with raises(
        TypeError, "batches must be a list of batches, got a dict: put a single batch into a list."
    ):
        check(network.model, network.variables, {"x": x[0]})
    with raises(ValueError, "batches must hold at least one batch, got none."):
        check(network.model, network.variables, [])
    with raises(
        TypeError,
        "model must be a flax.linen.Module, a flax.nnx.Module or a flax.nnx.GraphDef, got list.",
    ):
        check([], network.variables, x)


class Once:
    """Batches that only the first pass can read."""

    def __init__(self, batches):
        self.remaining = iter(batches)

    def __iter__(self):
        return self.remaining


def test_batches_that_can_be_read_only_once():
    model = Norm(True)
    variables = model.init(jax.random.key(0), data()[0])
    with raises(
        ValueError,
        "batches were exhausted by the first pass over them: give a list, or an iterable that "
        "starts again with each iter().",
    ):
        check(model, variables, Once(data()))


def test_a_running_variance_of_zero():
    model, variables = exact(lambda norm, x: norm(epsilon=0)(x), shuffled())
    variables["batch_stats"]["BatchNorm_0"]["var"] *= 0
    report = check(model, variables, shuffled())
    assert codes(report) == [("BatchNorm_0", "off")]
    assert "the running variance is 0 times that of the data" in report.findings[0].text


def test_frozen_dicts():
    network = Linen().recalibrate(data())
    network.variables = nn.FrozenDict(network.variables)
    assert network.check(data()).ok


@pytest.mark.parametrize("value, found", [(2.0, []), (np.nan, [("BatchNorm_0", "non-finite")])])
def test_a_model_with_frozen_layers_only(value, found):
    """There is nothing to compare, but the values are checked."""
    x = shuffled(64, batches=1)
    model = Model(lambda norm, x: jaxbn.linen.BatchNorm(frozen=True)(x))
    variables = model.init(jax.random.key(0), x[0])
    variables["batch_stats"]["BatchNorm_0"]["var"] *= value
    report = check(model, variables, x)
    assert codes(report) == found
    assert [row.path for row in report.layers] == ["BatchNorm_0"]


def test_groups_of_few_values_in_large_batches_need_larger_groups():
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    (finding,) = check(*exact(lambda norm, x: norm(virtual_batch_size=8)(x), [x]), [x]).findings
    assert "Use a larger virtual_batch_size, share" in finding.text


def test_layers_that_share_statistics_may_have_few_values_on_each_device():
    x = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
    assert check(*exact(lambda norm, x: norm(axis_name="devices")(x), [x]), [x]).ok


def test_rules_of_override_hold_while_a_model_is_checked():
    x = shuffled(64, batches=1)
    model = Model(lambda norm, x: norm(name="b")(norm(name="a")(x)))
    variables = model.init(jax.random.key(0), x[0])
    assert codes(check(model, variables, x)) == [("a", "never-updated")]
    frozen = jaxbn.linen.override(check, {"a": {"frozen": True}})
    assert codes(frozen(model, variables, x)) == [("b", "never-updated")]
