"""Comparing two layers: what the report says, and which arguments are refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxbn
from jaxbn.parity import assert_parity, batch_norm_layer, compare, compare_models, torch_layer
from tests.faulty import FEATURES, BatchNorm, DifferentiableBatchNorm, N, batches
from tests.raises import raises

BIASED = f"running variance differs by n/(n-1) = {N}/{N - 1}: biased against unbiased"


class NotFinite(BatchNorm):
    def train(self, x):
        y = super().train(x)
        y[0, 0] = np.nan
        return y


def test_nan_is_a_difference(rng):
    report = compare(NotFinite(), BatchNorm(), batches(rng))
    assert report.first_difference[:2] == ("step 1", "y")
    assert report.diagnosis == ("y at step 1: not finite: candidate",)
    both = compare(NotFinite(), NotFinite(), batches(rng))
    assert both.diagnosis == ("y at step 1: not finite: candidate and reference",)
    rows = json.loads(json.dumps(both.to_dict(), allow_nan=False))["rows"]
    assert [row["relative"] for row in rows if row["name"] == "y"] == [None] * 3


def test_shapes_may_differ(rng):
    class Flat(BatchNorm):
        def train(self, x):
            return super().train(x).ravel()

    report = compare(Flat(), BatchNorm(), batches(rng))
    assert report.diagnosis == ("y at step 1: shape (192,) against (32, 6)",)


def test_layers_without_step_have_no_gradients(rng):
    report = compare(BatchNorm(), DifferentiableBatchNorm(), batches(rng))
    assert report.ok
    assert report.notes == ("no gradients: the candidate has no step",)
    assert {row.name for row in report.rows} == {"y", "running mean", "running var", "evaluation y"}
    report = compare(DifferentiableBatchNorm(), BatchNorm(), batches(rng))
    assert report.notes == ("no gradients: the reference has no step",)


def test_a_gradient_that_one_side_lacks_is_noted(rng):
    class NoBias(DifferentiableBatchNorm):
        def step(self, x, dy):
            y, grads = super().step(x, dy)
            return y, {"x": grads["x"], "scale": grads["scale"]}

    report = compare(NoBias(), DifferentiableBatchNorm(), batches(rng))
    assert report.notes == ("dbias: only the reference has it",)


def test_units():
    class Given(BatchNorm):
        def __init__(self, y):
            super().__init__(features=2)
            self.y = np.float32(y)

        def train(self, x):
            return self.y

        evaluate = train

    x = np.ones((1, 2), np.float32)
    # The last place of numbers in [2, 4) is 2^-22.
    report = compare(Given([[3 + 2**-21, 0]]), Given([[3, 2**-23]]), [x])
    row = report.rows[2]
    assert row.ulp == 2
    assert row.relative == pytest.approx(2**-21 / 3)


@pytest.mark.parametrize("convention", ["PYTORCH", "FLAX", "KERAS", "EXERCISE"])
def test_our_layer_and_the_textbook(rng, convention):
    options = getattr(jaxbn, convention)
    textbook = DifferentiableBatchNorm(**options)
    params, state = jaxbn.init((1, FEATURES))
    params = {"scale": jnp.float32(textbook.scale), "bias": jnp.float32(textbook.bias)}
    assert_parity(batch_norm_layer(params, state, **options), textbook, batches(rng))


def test_torch_against_the_conventions(rng):
    layer = torch.nn.BatchNorm1d(FEATURES)
    params, state = jaxbn.init((1, FEATURES))
    data = batches(rng)
    assert_parity(batch_norm_layer(params, state), torch_layer(layer), data)
    report = compare(batch_norm_layer(params, state, **jaxbn.KERAS), torch_layer(layer), data)
    assert list(report.diagnosis) == [
        "momentum 0.99 against 0.9",
        BIASED,
        "epsilon 1e-3 against 1e-5",
    ]


def test_assert_parity_fails_with_the_report(rng):
    data = batches(rng)
    report = compare(BatchNorm(running_variance="biased"), BatchNorm(), data)
    with raises(AssertionError, str(report)):
        assert_parity(BatchNorm(running_variance="biased"), BatchNorm(), data)
    assert_parity(BatchNorm(running_variance="biased"), BatchNorm(), data, rtol=0.1)


def test_text(rng):
    lines = str(
        compare(BatchNorm(running_variance="biased"), BatchNorm(), batches(rng, steps=1))
    ).splitlines()
    assert lines[0].startswith("The first difference is at step 1, running var: relative error 0.0")
    assert lines[0].endswith(" ulp (rtol 1e-05).")
    assert lines[1] == f"- {BIASED}"
    assert lines[2] == "(no gradients: neither layer has a step)"
    assert lines[4].split() == ["relative", "ulp"]
    assert [line.endswith("differs") for line in lines[5:]] == [
        False,
        False,
        False,
        False,
        True,
        True,
    ]
    assert str(compare(BatchNorm(), BatchNorm(), batches(rng))).startswith(
        "No relative difference exceeds 1e-05.\n"
    )


def test_a_long_text_shows_only_what_differs(rng):
    report = compare(BatchNorm(epsilon=1e-3), BatchNorm(), batches(rng, steps=40))
    lines = str(report).splitlines()
    assert lines[-1] == f"({len(report.rows) - 60} rows omitted)"
    assert all(line.endswith("differs") for line in lines[5:-1])


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "batches is empty; at least one batch is needed."),
        (
            [np.ones(3, np.float32)],
            ValueError,
            "batches[0] must have shape (N, C), with at least one value; got (3,).",
        ),
        (
            [np.ones((4, 3), np.int32)],
            TypeError,
            "batches[0] must be float32 or float64, got int32; convert it, for instance with "
            "x.astype(np.float32).",
        ),
        (
            [np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)],
            ValueError,
            "batches[1] has 2 features, but batches[0] has 3; all batches must have the same "
            "number.",
        ),
        (
            [np.full((4, 3), np.nan, np.float32)],
            ValueError,
            "batches[0] has values that are not finite.",
        ),
    ],
)
def test_bad_batches(data, error, message):
    with raises(error, message):
        compare(BatchNorm(features=3), BatchNorm(features=3), data)


@pytest.mark.parametrize(
    ("rtol", "error", "message"),
    [
        (-1, ValueError, "rtol is -1; it must be finite and at least 0, such as 1e-5 for float32."),
        (
            float("nan"),
            ValueError,
            "rtol is nan; it must be finite and at least 0, such as 1e-5 for float32.",
        ),
        (
            np.float32("inf"),
            ValueError,
            "rtol is inf; it must be finite and at least 0, such as 1e-5 for float32.",
        ),
        ("1e-5", TypeError, "rtol must be a number, got '1e-5' of type str."),
        (True, TypeError, "rtol must be a number, got True of type bool."),
        (None, TypeError, "rtol must be a number, got None of type NoneType."),
    ],
)
@pytest.mark.parametrize("compares", [compare, assert_parity, compare_models])
def test_an_rtol_that_is_not_a_tolerance(compares, rtol, error, message, rng):
    arguments = [batches(rng)] if compares is not compare_models else [np.ones(3)]
    with raises(error, message):
        compares(BatchNorm(), BatchNorm(), *arguments, rtol=rtol)


def test_an_rtol_of_zero_requires_the_same_bits(rng):
    assert compare(BatchNorm(), BatchNorm(), batches(rng), rtol=0).ok
    assert not compare(BatchNorm(bias=2**-20), BatchNorm(), batches(rng), rtol=0).ok


def test_an_object_that_is_not_a_layer():
    with raises(
        TypeError, "reference must have the methods train, evaluate and running; got 3 of type int."
    ):
        compare(BatchNorm(), 3, [])


@pytest.mark.parametrize("spoilt", ["dx", "running mean", "running var", "evaluation y"])
def test_no_feature_hides_another(spoilt):
    """A fault in one feature is found beside features whose values are a million times larger."""

    class Spoilt:
        def __init__(self):
            self.layer = batch_norm_layer(*jaxbn.init((1, 3)))
            self.train = self.layer.train

        def of(self, name, value):
            """Put the smallest feature ten percent off if this is the quantity to spoil."""
            if name != spoilt:
                return value
            smallest = np.abs(value).max(0).argmin() if value.ndim > 1 else np.abs(value).argmin()
            factor = np.ones(3, np.float32)
            factor[smallest] = 1.1
            return value * factor

        def evaluate(self, x):
            return self.of("evaluation y", self.layer.evaluate(x))

        def running(self):
            mean, var = self.layer.running()
            return self.of("running mean", mean), self.of("running var", var)

        def step(self, x, dy):
            y, gradients = self.layer.step(x, dy)
            return y, {**gradients, "x": self.of("dx", gradients["x"])}

    deviations = np.array([1e-3, 1, 1e3], np.float32)
    x = np.random.default_rng(0).normal(2, 1, (32, 3)).astype(np.float32) * deviations
    constant = np.full((32, 1), 3.3, np.float32)
    theirs = torch_layer(torch.nn.BatchNorm1d(3))
    # With deviations down to epsilon, and for a constant feature, two implementations agree.
    usual = np.concatenate([x[:, 1:] / 10, constant], 1)
    same = compare(theirs, batch_norm_layer(*jaxbn.init((1, 3))), [usual], rtol=1e-3)
    assert same.ok, str(same)
    report = compare(Spoilt(), batch_norm_layer(*jaxbn.init((1, 3))), [x])
    assert any(row.name == spoilt and row.relative > 1e-3 for row in report.rows), str(report)
