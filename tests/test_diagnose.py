"""The diagnosis of two layers names each planted fault, and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxbn
from jaxbn.parity import batch_norm_layer, compare, torch_layer
from tests.faulty import FEATURES, BatchNorm, DifferentiableBatchNorm, N, batches

BIASED = f"running variance differs by n/(n-1) = {N}/{N - 1}: biased against unbiased"
FAULTS = {
    "running biased": ({"running_variance": "biased"}, [BIASED]),
    "batch unbiased": (
        {"batch_variance": "unbiased"},
        [f"batch variance differs by n/(n-1) = {N}/{N - 1}: unbiased against biased"],
    ),
    "two definitions": (
        {"momentum": 0.1},
        ["momentum 0.1 against 0.9: the two definitions of momentum, m and 1 - m"],
    ),
    "momentum": ({"momentum": 0.99}, ["momentum 0.99 against 0.9"]),
    "cumulative": ({"momentum": None}, ["momentum: the cumulative average against 0.9"]),
    "frozen": ({"frozen": True}, ["running statistics are not updated (candidate)"]),
    "epsilon 1e-3": ({"epsilon": 1e-3}, ["epsilon 1e-3 against 1e-5"]),
    "epsilon 1e-6": ({"epsilon": 1e-6}, ["epsilon 1e-6 against 1e-5"]),
    "epsilon 2.5e-4": ({"epsilon": 2.5e-4}, ["epsilon 2.5e-4 against 1e-5"]),
    "scale": ({"scale": 1.1}, ["scale differs by up to 0.2"]),
    "bias": ({"bias": 0.25}, ["bias differs by up to 0.25"]),
    "start": ({"start": (0.0, 2.0)}, ["initial values differ: running variance"]),
    "evaluation": (
        {"batch_in_evaluation": True},
        ["evaluation normalizes with the statistics of the batch (candidate)"],
    ),
    "per example": (
        {"per_example": True},
        ["statistics of another axis: per example (candidate)"],
    ),
    "bfloat16": ({"rounded_to": jnp.bfloat16}, ["outputs are rounded to bfloat16 (candidate)"]),
    "float16": ({"rounded_to": np.float16}, ["outputs are rounded to float16 (candidate)"]),
    "Keras": (
        {"momentum": 0.99, "epsilon": 1e-3, "running_variance": "biased"},
        ["momentum 0.99 against 0.9", BIASED, "epsilon 1e-3 against 1e-5"],
    ),
    "epsilon and scale": (
        {"epsilon": 1e-3, "scale": 0.9},
        ["epsilon 1e-3 against 1e-5", "scale differs by up to 0.2"],
    ),
    "start and momentum": (
        {"start": (1.0, 1.0), "momentum": 0.99},
        ["momentum 0.99 against 0.9", "initial values differ: running mean"],
    ),
    "bias and evaluation": (
        {"bias": 0.25, "batch_in_evaluation": True},
        [
            "bias differs by up to 0.25",
            "evaluation normalizes with the statistics of the batch (candidate)",
        ],
    ),
}


# The differentiable layer does not implement the gradients of normalization per example.
@pytest.mark.parametrize(
    ("fault", "cls"),
    [
        *((f, BatchNorm) for f in FAULTS),
        *((f, DifferentiableBatchNorm) for f in FAULTS if f != "per example"),
    ],
)
def test_each_fault_is_named_and_no_other(rng, fault, cls):
    options, words = FAULTS[fault]
    report = compare(cls(**options), cls(), batches(rng))
    assert not report.ok
    assert list(report.diagnosis) == words


@pytest.mark.parametrize("fault", FAULTS)
def test_one_step_is_enough(rng, fault):
    options, words = FAULTS[fault]
    # After one step the cumulative average is a momentum of zero.
    words = [w.replace(": the cumulative average", " 0") for w in words]
    report = compare(BatchNorm(**options), BatchNorm(), batches(rng, steps=1))
    assert list(report.diagnosis) == words


@pytest.mark.parametrize("mean", [0.0, 3.0, 300.0])
@pytest.mark.parametrize(
    "options", [{}, {"epsilon": 1e-3}, {"momentum": None, "batch_variance": "unbiased"}], ids=str
)
def test_equal_layers_have_no_diagnosis(rng, mean, options):
    layers = [DifferentiableBatchNorm(**options) for _ in range(2)]
    report = compare(*layers, batches(rng, mean=mean))
    assert report.ok
    assert report.first_difference is None
    assert report.diagnosis == ()
    assert max(row.relative for row in report.rows) == 0


def test_the_faulty_layer_is_named(rng):
    report = compare(BatchNorm(), BatchNorm(epsilon=1e-3, batch_in_evaluation=True), batches(rng))
    assert report.diagnosis == (
        "epsilon 1e-5 against 1e-3",
        "evaluation normalizes with the statistics of the batch (reference)",
    )


@pytest.mark.parametrize("both", [{}, {"epsilon": 1e-3}], ids=str)
@pytest.mark.parametrize(
    ("constants", "words"),
    [
        ("all", "the backward pass treats mean and variance as constants (candidate)"),
        ("variance", "the backward pass treats the variance as a constant (candidate)"),
    ],
)
def test_gradients(rng, both, constants, words):
    report = compare(
        DifferentiableBatchNorm(constants=constants, **both),
        DifferentiableBatchNorm(**both),
        batches(rng),
    )
    assert report.diagnosis == (words,)
    assert (report.first_difference.stage, report.first_difference.name) == ("step 1", "dx")


@pytest.mark.parametrize("mean", [30, 300, 3000])
@pytest.mark.parametrize("cls", [BatchNorm, DifferentiableBatchNorm])
def test_cancellation(rng, mean, cls):
    report = compare(cls(naive_variance=True), cls(), batches(rng, mean=mean))
    (words,) = report.diagnosis
    head, far, tail = words.partition("mean ")[0], *words.partition("mean ")[2].split(" ", 1)
    assert (head, tail) == (
        "variance lost to cancellation: ",
        "deviations from zero (candidate)",
    )
    assert float(far) == pytest.approx(mean, rel=0.5)
    other = compare(cls(), cls(naive_variance=True), batches(rng, mean=mean))
    assert other.diagnosis[0].endswith("(reference)")


def test_cancellation_in_one_feature_and_another_epsilon(rng):
    data = batches(rng)
    for x in data:
        x[:, 2] += 300 * x[:, 2].std()
    report = compare(BatchNorm(naive_variance=True, epsilon=1e-3), BatchNorm(), data)
    epsilon, cancellation = report.diagnosis
    assert epsilon == "epsilon 1e-3 against 1e-5"
    assert cancellation.startswith("variance lost to cancellation: mean 3")


@pytest.mark.parametrize("mean", [300, 3000])
def test_rounding_of_the_mean(rng, mean):
    """PyTorch multiplies `x` before it subtracts the mean; its variance is accurate."""
    params, state = jaxbn.init((1, FEATURES))
    data = batches(rng, mean=mean, n=256)
    layers = batch_norm_layer(params, state), torch_layer(torch.nn.BatchNorm1d(FEATURES))
    (words,) = compare(*layers, data).diagnosis
    assert words.startswith("rounding of the mean: ")
    assert words.endswith(" deviations from zero")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 1e-3}, ["epsilon 1e-3 against 1e-5"]),
        ({"scale": -1}, ["scale differs by up to 4"]),
    ],
)
def test_constant_features_hide_nothing(rng, options, words):
    data = batches(rng)
    for x in data:
        x[:, 1], x[:, 2] = 3.25, 0
    report = compare(DifferentiableBatchNorm(**options), DifferentiableBatchNorm(), data)
    assert list(report.diagnosis) == words


def test_the_rounding_of_a_constant_feature(rng):
    class Rounded(BatchNorm):
        def statistics(self, x, ddof):
            mean, var = super().statistics(x, ddof)
            return mean + np.spacing(np.float32(3.25)) * (x.var(0) == 0), var

    data = batches(rng)
    for x in data:
        x[:, 1] = 3.25
    assert compare(Rounded(), BatchNorm(), data).diagnosis == (
        "constant features: their rounding errors are divided by sqrt(epsilon)",
    )
    report = compare(Rounded(epsilon=1e-3), BatchNorm(), batches(rng))
    assert report.diagnosis == ("epsilon 1e-3 against 1e-5",)


@pytest.mark.parametrize("bias", [None, 0, 1, np.arange(FEATURES)], ids=str)
@pytest.mark.parametrize("features", [1, 2, FEATURES])
@pytest.mark.parametrize("cls", [BatchNorm, DifferentiableBatchNorm])
def test_a_scale_of_zero(rng, cls, features, bias):
    """Outputs that do not depend on the input would fit any dtype, any axis and any gradient."""
    zero = cls(scale=0, features=features)
    if bias is not None:
        zero.bias = np.broadcast_to(np.float64(bias), FEATURES)[:features]
    data = batches(rng, features=features)
    report = compare(zero, cls(features=features), data)
    assert report.diagnosis == ("the scale is zero (candidate)",)
    zero.mean, zero.var = (np.full(features, v, np.float32) for v in (0, 1))
    report = compare(cls(features=features, momentum=0.99), zero, data)
    assert report.diagnosis == ("momentum 0.99 against 0.9", "the scale is zero (reference)")


def test_a_scale_of_zero_in_some_features(rng):
    candidate = BatchNorm()
    candidate.scale[:-1] = 0
    assert compare(candidate, BatchNorm(), batches(rng)).diagnosis == (
        "scale differs by up to 1.7",
    )


def test_evaluation_is_correct_if_running_statistics_equal_those_of_the_batch(rng):
    report = compare(
        BatchNorm(momentum=0.0, running_variance="biased"),
        BatchNorm(running_variance="biased"),
        batches(rng),
    )
    assert report.diagnosis == ("momentum 0 against 0.9",)


def test_a_difference_larger_than_the_rounding_of_a_constant_feature():
    data = [np.full((8, FEATURES), 3.3, np.float32)] * 2
    report = compare(DifferentiableBatchNorm(bias=0.25), DifferentiableBatchNorm(), data)
    assert report.diagnosis == ("no known reason: y, evaluation y",)


# With the smallest variance, 0.01, float32 resolves an epsilon to a few times 1e-9.
@pytest.mark.parametrize(
    ("epsilon", "words"),
    [
        (1.2345e-4, "1.2345e-4"),
        (1.7e-5, "1.7e-5"),
        (0.37, "0.37"),
        (1.0, "1"),
        (100.0, "100"),
        (1e-12, "0"),
    ],
)
@pytest.mark.parametrize("rtol", [1e-5, 1e-4])
@pytest.mark.parametrize("options", [{}, {"scale": 0.9}], ids=str)
def test_any_epsilon_is_found_to_the_precision_of_float32(rng, epsilon, words, rtol, options):
    candidate = BatchNorm(epsilon=epsilon, **options)
    report = compare(candidate, BatchNorm(epsilon=2.345e-3), batches(rng), rtol=rtol)
    assert report.diagnosis[0] == f"epsilon {words} against 2.345e-3"
    assert list(report.diagnosis[1:]) == ["scale differs by up to 0.2"][: len(options)]


class Transposed(BatchNorm):
    """A layer that normalizes over the features, with statistics per example."""

    def train(self, x):
        return super().train(x.T).T

    def evaluate(self, x):
        return super().evaluate(x.T).T


def without_parameters(cls, **options):
    layer = cls(**options)
    layer.scale, layer.bias = np.ones_like(layer.scale), np.zeros_like(layer.bias)
    return layer


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (
            N,
            f"statistics of another axis: running statistics have shape ({N},) against (6,)",
        ),
        (FEATURES, "running statistics are those of another axis (candidate)"),
    ],
)
def test_another_axis_shows_in_the_running_statistics(rng, n, words):
    candidate = without_parameters(Transposed, features=n)
    report = compare(candidate, without_parameters(BatchNorm), batches(rng, n=n))
    assert set(report.diagnosis) == {words, "statistics of another axis: per example (candidate)"}


class Odd(DifferentiableBatchNorm):
    """A layer with a fault that has no known reason."""

    def step(self, x, dy):
        y, grads = super().step(x, dy)
        return y, {**grads, "x": grads["x"] * np.sign(x)}


def test_a_difference_without_known_reason(rng):
    report = compare(Odd(), DifferentiableBatchNorm(), batches(rng))
    assert report.diagnosis == ("no known reason: dx",)
    # A second difference, which has a reason, does not hide it.
    report = compare(Odd(momentum=0.99), DifferentiableBatchNorm(), batches(rng))
    assert report.diagnosis == ("momentum 0.99 against 0.9", "no known reason: dx")


class Cubed(BatchNorm):
    def normalized(self, x, mean, var):
        return super().normalized(x, mean, var) ** 3


def test_no_known_reason_for_the_output(rng):
    report = compare(Cubed(), BatchNorm(), batches(rng))
    assert report.diagnosis == ("no known reason: y, evaluation y",)
