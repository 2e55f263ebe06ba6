"""`identify` on layers in NumPy: with random conventions, and with none."""

import numpy as np
import pytest

import jaxbn
from jaxbn.parity import ConventionError, identify
from tests.faulty import FEATURES, BatchNorm
from tests.numpy_layers import (
    AddsEpsilonToTheTracked,
    BiasCorrected,
    Clamped,
    EpsilonOutside,
    EvaluatesWithoutBias,
    Frozen,
    HalfTheBatchVariance,
    InitialVarianceLeftIn,
    MedianMean,
    MomentumPerFeature,
    NegativeVariance,
    NoEpsilon,
    Noisy,
    NormalizesRows,
    NoScale,
    NotANumber,
    NumpyBatchNorm,
    OneStatisticForAll,
    OwnBiasInEvaluation,
    OwnEpsilonInEvaluation,
    OwnMomentumForTheVariance,
    Relu,
    RunningStatisticsInTraining,
    TracksDeviations,
    Transposed,
    UpdatesTheMeanByValue,
    WarmedUp,
)

C = 5
ESTIMATORS = ["biased", "unbiased"]
PRESETS = ["PYTORCH", "FLAX", "KERAS", "EXERCISE"]
# So far below the scales that the rounding of the outputs exceeds a relative error of these.
SMALL = np.linspace(5e-5, 1e-4, C)


def check(found, *, momentum, epsilon, batch_variance, running_variance):
    assert (found["batch_variance"], found["running_variance"]) == (
        batch_variance,
        running_variance,
    )
    if momentum is None:
        assert found["momentum"] is None
    else:
        assert abs(found["momentum"] - momentum) < 1e-3
    assert abs(found["epsilon"] / epsilon - 1) < 0.1


@pytest.mark.parametrize("seed", range(60))
def test_a_random_convention(seed):
    rng = np.random.default_rng(seed)
    # Momenta from 0 to 0.999, most of them near 1; a sixth of the layers cumulative.
    momentum = None if seed % 6 == 0 else max(0.0, 1 - 10.0 ** rng.uniform(-3, 0.05))
    convention = {
        "momentum": momentum,
        "epsilon": 10.0 ** rng.uniform(-6, -1),
        "batch_variance": rng.choice(ESTIMATORS),
        "running_variance": rng.choice(ESTIMATORS),
    }
    layer = NumpyBatchNorm(
        rng,
        **convention,
        features=rng.integers(1, 9),
        dtype=rng.choice([np.float32, np.float64]),
        count=rng.integers(0, 200),
    )
    check(identify(layer, len(layer.mean)), **convention)


@pytest.mark.parametrize("momentum", [0.0, 0.001, 0.9, 0.99, 0.999, None])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-3, 0.1])
def test_round_numbers_are_found_exactly(momentum, epsilon, rng):
    found = identify(NumpyBatchNorm(rng, momentum=momentum, epsilon=epsilon), C)
    assert found == {**jaxbn.PYTORCH, "momentum": momentum, "epsilon": epsilon}


def test_the_result_is_keyword_arguments_of_batch_norm(rng):
    convention = {**jaxbn.EXERCISE, "epsilon": 0.01}
    layer = NumpyBatchNorm(rng, **convention)
    found = identify(NumpyBatchNorm(rng, **convention), C)
    x = rng.normal(size=(8, C)).astype(np.float32)
    params = {"scale": layer.scale, "bias": layer.bias}
    state = {"mean": layer.mean, "var": layer.var}
    y, state = jaxbn.batch_norm(params, state, x, True, **found)
    np.testing.assert_allclose(y, layer.train(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state["var"], layer.var, rtol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_a_trained_layer_far_from_its_initial_statistics(seed):
    rng = np.random.default_rng(seed)
    layer = NumpyBatchNorm(rng, momentum=0.97, epsilon=1e-3, batch_variance="unbiased")
    layer.mean = (layer.mean + 300).astype(np.float32)
    layer.var = (layer.var * 1e4).astype(np.float32)
    assert identify(layer, C) == {**jaxbn.EXERCISE, "momentum": 0.97, "epsilon": 1e-3}


@pytest.mark.parametrize("scale", [[0, 0, 1, 0, 0], [1e-3, 1e3, -1, 1, 0], [-0.01] * C])
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_features_of_any_scale(scale, bias, rng):
    layer = NumpyBatchNorm(rng)
    layer.scale, layer.bias = np.float32(scale), np.full(C, bias, np.float32)
    assert identify(layer, C) == jaxbn.PYTORCH


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("bias", [SMALL, np.full(C, 1e-6), np.zeros(C)], ids=["5e-5", "1e-6", "0"])
@pytest.mark.parametrize("cls", [NumpyBatchNorm, UpdatesTheMeanByValue])
def test_a_bias_that_is_small_beside_the_scale(preset, bias, cls):
    convention = getattr(jaxbn, preset)
    for seed in range(5):
        layer = cls(np.random.default_rng(seed), **convention)
        layer.bias = np.float32(bias)
        assert identify(layer, C) == convention


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "change",
    [
        *({"epsilon": 1e-3}, {"epsilon": 1e-5}, {"epsilon": 1.2e-5}, {"momentum": 0.89}),
        *({"batch_variance": e} for e in ESTIMATORS),
        *({"running_variance": e} for e in ESTIMATORS),
    ],
    ids=str,
)
def test_a_small_bias_hides_no_difference(preset, change, rng):
    convention = {**getattr(jaxbn, preset), **change}
    layer = NumpyBatchNorm(rng, **convention)
    layer.bias = np.float32(SMALL)
    assert identify(layer, C) == convention


@pytest.mark.parametrize("preset", PRESETS)
def test_a_small_bias_in_evaluation_alone_is_noticed(preset, rng):
    layer = OwnBiasInEvaluation(rng, **getattr(jaxbn, preset))
    layer.bias = np.float32(SMALL)
    with pytest.raises(ConventionError, match="evaluation: the output is not x normalized"):
        identify(layer, C)


@pytest.mark.parametrize(
    "fault, probe",
    [
        ({"per_example": True}, "batch variance"),
        ({"batch_in_evaluation": True}, "evaluation"),
        ({"rounded_to": np.float16}, "evaluation"),
    ],
    ids=str,
)
def test_a_fault_beside_a_small_bias(fault, probe):
    layer = BatchNorm(**fault)
    layer.bias = np.linspace(5e-5, 1e-4, FEATURES)
    with pytest.raises(ConventionError) as caught:
        identify(layer, FEATURES)
    assert caught.value.probe == probe


@pytest.mark.parametrize("momentum", [0.3, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bias_corrected_averages_are_named(momentum, count, dtype, rng):
    layer = BiasCorrected(rng, momentum=momentum, count=count, dtype=dtype)
    with pytest.raises(ConventionError, match="they are bias-corrected: decayed sums") as caught:
        identify(layer, C)
    found = caught.value.found
    assert found.pop("averages") == "bias-corrected"
    check(found, **{**jaxbn.PYTORCH, "momentum": momentum})


def test_a_correction_that_ignores_the_initial_variance_is_named(rng):
    with pytest.raises(ConventionError, match="adds to that of the variance") as caught:
        identify(InitialVarianceLeftIn(rng, momentum=0.9), C)
    assert caught.value.found["averages"] == "bias-corrected, with the initial variance left in"


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("batch_variance", ESTIMATORS)
def test_epsilon_outside_the_root_is_named(epsilon, batch_variance, rng):
    layer = EpsilonOutside(rng, epsilon=epsilon, batch_variance=batch_variance)
    with pytest.raises(ConventionError, match="added to the standard deviation") as caught:
        identify(layer, C)
    found = caught.value.found
    assert found.pop("epsilon_added_to") == "the standard deviation"
    check(found, **{**jaxbn.PYTORCH, "epsilon": epsilon, "batch_variance": batch_variance})


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("batch_variance", ESTIMATORS)
def test_statistics_that_never_move(epsilon, batch_variance, rng):
    """Layers of PyTorch with `momentum=0` normalize with the batch, and keep their statistics."""
    layer = NumpyBatchNorm(rng, momentum=1.0, epsilon=epsilon, batch_variance=batch_variance)
    assert identify(layer, C) == {
        "momentum": 1.0,
        "epsilon": epsilon,
        "batch_variance": batch_variance,
    }


BROKEN = [
    (Frozen, {}, "running mean", "the layer is frozen, or in evaluation"),
    (NumpyBatchNorm, {"momentum": 0.99999}, "running mean", "moves it by 1e-05 of the distance"),
    (OwnMomentumForTheVariance, {}, "running variance", "with the momentum of the mean"),
    (MomentumPerFeature, {}, "running mean", "differs between features"),
    (WarmedUp, {}, "running mean", "have the weights 1, 0.1, 0.1"),
    (TracksDeviations, {}, "running variance", "1, 1, 1 would be the biased estimator"),
    (AddsEpsilonToTheTracked, {}, "running variance", "after a new batch"),
    (MedianMean, {}, "training output", "the other findings do not predict"),
    (HalfTheBatchVariance, {}, "batch variance", "divided by 1.5, 1, 1 times"),
    (Clamped, {}, "epsilon", "fit no value"),
    (NoEpsilon, {}, "epsilon", "it has no effect"),
    (OwnEpsilonInEvaluation, {}, "evaluation", "training's scale, bias and epsilon, 1e-05"),
    (OwnEpsilonInEvaluation, {"momentum": 0.99}, "evaluation", "epsilon, 1e-05"),
    (OwnEpsilonInEvaluation, {"momentum": 0.5, "epsilon": 1e-6}, "evaluation", "epsilon, 1e-06"),
    (EvaluatesWithoutBias, {}, "evaluation", "training's scale, bias"),
    (Relu, {}, "batch variance", "not a linear function"),
    (Noisy, {}, "batch variance", "not a linear function"),
    (NotANumber, {}, "evaluation", "evaluate(x) is not finite"),
    (OneStatisticForAll, {}, "evaluation", "the running mean has shape (1,), not (5,)"),
    (NegativeVariance, {}, "evaluation", "the running variance is negative"),
    (Transposed, {}, "evaluation", "evaluate(x) has shape (5, 16), but x has shape (16, 5)"),
    (NoScale, {}, "batch variance", "no feature has a scale"),
    (NormalizesRows, {}, "batch variance", "no feature has a scale"),
    (RunningStatisticsInTraining, {}, "batch variance", "divided by"),
]


@pytest.mark.parametrize(
    "layer, options, probe, reason", BROKEN, ids=[f"{b[0].__name__}-{b[1]}" for b in BROKEN]
)
@pytest.mark.parametrize("bias", [None, SMALL], ids=["any bias", "small bias"])
def test_a_layer_without_convention_fails_at_a_probe(layer, options, probe, reason, bias, rng):
    black_box = layer(rng, **options)
    if bias is not None:
        black_box.bias = np.float32(bias)
    with np.errstate(divide="ignore"), pytest.raises(ConventionError) as caught:
        identify(black_box, C)
    assert (caught.value.probe, reason in caught.value.reason) == (probe, True), caught.value
    assert probe in str(caught.value) and caught.value.reason in str(caught.value)


def test_the_error_names_what_was_found_before(rng):
    with pytest.raises(ConventionError) as caught:
        identify(Clamped(rng), C)
    assert caught.value.found == {
        "momentum": 0.9,
        "running_variance": "unbiased",
        "batch_variance": "biased",
    }
    assert str(caught.value).endswith(
        "Otherwise found: momentum=0.9, running_variance='unbiased', batch_variance='biased'."
    )


def test_no_features():
    with pytest.raises(ValueError, match=r"^num_features is 0; it must be at least 1\.$"):
        identify(NumpyBatchNorm(np.random.default_rng(0)), 0)
