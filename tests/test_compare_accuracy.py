"""Who is wrong: the rounding errors of two networks against their own float64."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch

import jaxbn
import jaxbn.linen
from jaxbn.parity import AccuracyReport, compare_accuracy
from jaxbn.parity._compare.accuracy_report import AccuracyRow
from tests.framework_networks import NAMES, linen_net, nnx_net, rows, torch_net
from tests.raises import raises

FAR = np.random.default_rng(0).normal(1000, 1, (64, 3)).astype(np.float32)


class Norm(nn.Module):
    """A batch norm of Flax or, with a convention, of this library."""

    convention: dict | None = None
    dtype: type | None = None

    @nn.compact
    def __call__(self, x, train):
        if self.convention is None:
            return nn.BatchNorm(not train, name="norm", dtype=self.dtype)(x)
        return jaxbn.linen.BatchNorm(not train, name="norm", **self.convention)(x)


def test_errors_are_those_against_the_own_float64():
    """PyTorch's runs are repeated here by hand; Flax cancels, and this library does not."""
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    module = Norm()
    variables = module.init(jax.random.key(0), FAR, train=False)
    report = compare_accuracy((module, variables), theirs, FAR)
    found = {row[:2]: row for row in report.rows}
    row = found["training forward", "norm"]

    outputs = [
        torch.nn.BatchNorm1d(3, dtype=dtype)(torch.tensor(FAR, dtype=dtype)).detach().double()
        for dtype in (torch.float32, torch.float64)
    ]
    expected = ((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max()).item()
    assert row.reference_error == pytest.approx(expected, rel=1e-9)
    # Both compute the same in float64, where E[x^2] - E[x]^2 loses 1e-10 of the variance.
    assert row.difference < 1e-8
    assert row.ratio == row.reference_error / row.candidate_error
    # Flax subtracts squares of 1e6 with a relative rounding of 6e-8; the variance is 1.
    assert row.candidate_error > 1e-3

    ours = compare_accuracy((Norm(jaxbn.PYTORCH), variables), (module, variables), FAR)
    row = next(row for row in ours.rows if row.stage == "training forward")
    # x - mean is exact, so only the mean, of 1000, is rounded: by 3e-5 deviations at most.
    assert row.candidate_error < 3e-5 < 1e-3 < row.reference_error
    assert row.ratio > 30


def test_faults_show_in_float64():
    theirs = torch_net()
    report = compare_accuracy(nnx_net(theirs, epsilon=0.1), theirs.double(), rows())
    row = next(row for row in report.rows if row[:2] == ("evaluation forward", "block/norm"))
    assert row.difference > 1e-3
    # Three layers of some five terms each, forward and backward, without cancellation.
    assert all(max(r.candidate_error, r.reference_error) < 1e-5 for r in report.rows)
    assert {r.name for r in report.rows if r.stage == "training forward"} == {*NAMES, "(output)"}
    assert not jax.config.jax_enable_x64


def test_dropout_is_noted():
    theirs = torch_net(dropout=0.5)
    report = compare_accuracy(linen_net(theirs), theirs, rows(), NAMES)
    assert report.notes == (
        "in training, PyTorch's dropout is active, so what follows it is random: 1.drop",
    )


ROWS = (
    AccuracyRow("evaluation forward", "a", 1e-16, 2e-7, 4e-7),
    AccuracyRow("evaluation forward", "b", 3e-16, 1e-7, 8e-7),
    AccuracyRow("training forward", "a", 0.0, 0.0, 1e-6),
    AccuracyRow("training forward", "b", 0.0, 0.0, 0.0),
)


def test_the_report():
    report = AccuracyReport(ROWS, ("a note",))
    assert [row.ratio for row in ROWS] == [pytest.approx(2), pytest.approx(8), np.inf, 1]
    assert report.worst(2) == (ROWS[2], ROWS[1])
    assert report.largest() == {
        "evaluation forward": AccuracyRow("evaluation forward", "(largest)", 3e-16, 2e-7, 8e-7),
        "training forward": AccuracyRow("training forward", "(largest)", 0.0, 0.0, 1e-6),
    }
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["rows"][2] == {**ROWS[2]._asdict(), "ratio": None}
    assert found["notes"] == ["a note"]
    assert str(report).splitlines() == [
        "(a note)",
        "                                  float64  float32 error  float32 error    reference",
        "                               difference   of candidate   of reference  / candidate",
        "evaluation forward  a             1.0e-16        2.0e-07        4.0e-07            2",
        "evaluation forward  b             3.0e-16        1.0e-07        8.0e-07            8",
        "training forward    a             0.0e+00        0.0e+00        1.0e-06          inf",
        "training forward    b             0.0e+00        0.0e+00        0.0e+00            1",
        "evaluation forward  (largest)     3.0e-16        2.0e-07        8.0e-07            4",
        "training forward    (largest)     0.0e+00        0.0e+00        1.0e-06          inf",
    ]


def test_a_network_with_a_dtype_of_its_own():
    module = Norm(dtype=np.float32)
    variables = module.init(jax.random.key(0), FAR, train=False)
    theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    with raises(
        ValueError,
        "norm in Flax is float32 where parameters and input are float64; make the network without "
        "a dtype of its own.",
    ):
        compare_accuracy((module, variables), theirs, FAR)


def test_integers():
    with raises(TypeError, "x must be floating, got int64; integers are not rounded."):
        compare_accuracy(torch_net(), torch_net(), np.ones((2, 3), int))


def test_a_keras_model():
    import keras

    with raises(
        TypeError,
        "the layers in Keras compute in the dtype that they were made with, so they cannot run in "
        "float64.",
    ), jax.numpy_rank_promotion("allow"):  # fmt: skip
        model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
        compare_accuracy(model, torch.nn.Sequential(torch.nn.BatchNorm1d(3)), FAR)
