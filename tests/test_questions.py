"""The questions: every experiment runs, obeys its exact laws, and has verdicts of both kinds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from train_examples.questions import __main__ as command
from train_examples.questions import bias, common, epsilon, initialization
from train_examples.questions.common import Settings

NAMES = {
    1: "epsilon",
    2: "moving_averages",
    3: "bias",
    4: "learning_rate",
    5: "initialization",
    6: "batch_size",
}
# The document wraps long lines, and indents what follows.
DOCUMENT = (Path(__file__).parent.parent / "docs" / "questions.md").read_text().replace("\n  ", " ")
VERDICT = re.compile(r"^- Prediction: .+\. Measured: .+\. \*\*(?:Holds|Fails)\.\*\*$", re.MULTILINE)


def check_epsilon(result):
    # Subtracting the batch's mean leaves a constant feature at zero, whatever the divisor.
    assert result.off_bias == 0
    assert result.constant.min() > 0
    np.testing.assert_array_equal(result.nan_without, result.constant)
    # The gradient of a constant feature is centred, then divided by sqrt(epsilon).
    scaled = result.constant_gradient * np.sqrt(epsilon.GRADIENTS_AT)[:, None]
    np.testing.assert_allclose(scaled, scaled[:1].repeat(len(scaled), 0), rtol=1e-5)
    for at, deviation in zip(epsilon.DEVIATIONS_AT, result.deviation, strict=True):
        law = np.sqrt(result.variance / (result.variance + at))
        # The tolerance covers the rounding of two sums of 1437 float32 values.
        np.testing.assert_allclose(deviation, law, rtol=1e-4)
    assert result.accuracy.shape == result.test_loss.shape == (1, 1)


def check_moving_averages(result):
    # The relative standard error of a variance from 100 repeats is sqrt(2 / 99), if all pixels are
    # fully correlated. The tolerance is five times that, halved for the square root.
    np.testing.assert_allclose(result.noise, result.noise_law, rtol=5 * (2 / 99) ** 0.5 / 2)
    # The mean of 100 repeats has a tenth of their noise.
    assert (np.abs(result.bias - result.bias_law) < 0.5 * result.noise_law).all()
    assert result.by_size.shape == result.changed.shape == (2, 1)
    assert result.by_share.shape == result.moving_by_share.shape == (2, 1)
    assert result.by_momentum.shape == (3, 1)


def check_bias(result):
    # A sum of 4096 terms that is zero, with one rounding error for each term.
    tolerance = 4096 * np.finfo(np.float64).eps
    training, evaluation, without = result.gradient
    assert (training < tolerance).all()
    assert (evaluation > 1e-3).all() and (without > 1e-3).all()
    # Later steps amplify any rounding.
    assert (result.difference[:, 0] < tolerance).all()
    assert result.difference.shape == (1, 2, 3, 1)


def check_learning_rate(result):
    assert result.loss.shape == result.accuracy.shape == (2, 2, 1)
    # Steps are orthogonal to a kernel whose length has no effect, so its length can only grow.
    assert (result.growth > 0.99).all()
    assert result.growth[1] > result.growth[0]


def check_initialization(result):
    assert result.accuracy.shape == (2, 2, 1, 1)
    # At the scale 0.1, epsilon is a thousandth of the variance.
    np.testing.assert_allclose(result.gradient[0, :, 0] * result.scales, 1, rtol=0.05)
    assert result.moved[0].max() < 0.05 < result.moved[1].max()


def check_batch_size(result):
    # The relative standard error of a variance from 400 draws of one channel is sqrt(2 / 399).
    np.testing.assert_allclose(
        result.noise, result.law[:, None].repeat(1, 1), rtol=5 * (2 / 399) ** 0.5
    )
    assert result.test_loss.shape == result.train_loss.shape == result.accuracy.shape == (3, 2, 1)
    assert result.whole.shape == (3, 1)


@pytest.mark.parametrize("number", NAMES)
def test_experiment(number, tmp_path, capsys):
    """The command draws a picture, and prints tables and verdicts in the document's form."""
    results = command.main([str(number), "--quick", "--seeds", "1", "--out", str(tmp_path)])
    assert list(results) == [number]
    result = results[number]
    for name, values in result._asdict().items():
        # A training that diverged has an infinite loss.
        assert np.isfinite(values).all() or (number, name) == (4, "loss"), name
    globals()[f"check_{NAMES[number]}"](result)

    printed = capsys.readouterr().out
    experiment, text = command.QUESTIONS[number]
    assert f"{number}. {text}" in printed
    for table in experiment.tables(result):
        assert f"| {table.columns[0].header}" in printed
    assert "too small to answer" in printed
    verdicts = experiment.verdicts(result)
    assert len(VERDICT.findall(printed)) == len(verdicts) >= 3
    section = DOCUMENT.partition(f"\n## {number}. {text}\n")[2].partition("\n## ")[0]
    assert len(VERDICT.findall(section)) == len(verdicts) == section.count("- Prediction: ")
    (picture,) = tmp_path.iterdir()
    assert picture.name == f"{NAMES[number]}.png"
    # Pictures have 200 dots per inch, for sharp screens, and are part of the repository.
    assert picture.stat().st_size < 200_000
    pixels = image.imread(picture)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 700
    assert pixels[..., :3].std() > 0.01


def test_every_experiment_begins_with_its_question_and_predictions():
    assert list(command.QUESTIONS) == list(NAMES)
    for number, (experiment, text) in command.QUESTIONS.items():
        assert experiment.__doc__.startswith(f"{number}. {text}\n")
        assert "\n\nPredictions: " in str(experiment.__doc__)


def test_predictions_can_fail():
    seeds = np.ones(2)
    difference = np.ones((2, 2, 3, 2))
    rounding = np.array([1e-16 * seeds, seeds, seeds])
    verdicts = bias.verdicts(bias.Result(rounding, np.arange(3), difference))
    assert [v.holds for v in verdicts] == [True, True, True]
    assert str(verdicts[0]).endswith(". **Holds.**")
    difference[:, 1] = 1e-3
    verdicts = bias.verdicts(bias.Result(0.1 * rounding[::-1], np.arange(3), difference))
    assert [v.holds for v in verdicts] == [False, False, True]
    assert str(verdicts[0]) == (
        "Prediction: in training, a bias has at most 1e-12 of a kernel's gradient in float64. "
        "Measured: at most 1.0e-01; without batch norm at least 1.0e-17. **Fails.**"
    )


def test_the_best_rate_is_chosen_per_scale():
    accuracy = np.zeros((2, 2, 2, 3))
    accuracy[0, :, 1] = 0.95
    accuracy[1, 0, 0] = [0.95, 0.95, 0.4]
    result = initialization.Result(
        np.array([0.1, 1.0]), np.array([0.1, 1.0]), accuracy, *np.ones((2, 2, 2, 3))
    )
    np.testing.assert_array_equal(initialization.best(result)[1, 0], [0.95, 0.95, 0.4])
    # A scale learns only if every seed does.
    np.testing.assert_array_equal(initialization.learns(result), [[True, True], [False, False]])
    np.testing.assert_array_equal(initialization.width(result), [10, 0])


def test_batches_are_epochs():
    indices = np.array(list(common.batches(4, seed=0, size=10, of=25)))
    assert indices.shape == (4, 10)
    for epoch in indices.reshape(2, -1):
        assert len(set(epoch)) == 20 and set(epoch) <= set(range(25))
    again = np.array(list(common.batches(4, seed=0, size=10, of=25)))
    np.testing.assert_array_equal(indices, again)
    assert (indices != np.array(list(common.batches(4, seed=1, size=10, of=25)))).any()


def test_the_scale_multiplies_convolutions_alone():
    model = common.plain(Settings(quick=True).widths)
    params: list[Any] = [common.start(model, 0, 0.1, scale).params for scale in (1.0, 10.0)]
    one, ten = params
    np.testing.assert_array_equal(ten["Conv_1"]["kernel"], 10 * one["Conv_1"]["kernel"])
    np.testing.assert_array_equal(ten["Conv_1"]["bias"], one["Conv_1"]["bias"])
    np.testing.assert_array_equal(ten["Dense_0"]["kernel"], one["Dense_0"]["kernel"])


def test_spread_counts_values_that_are_not_finite():
    assert common.spread([0.5, 0.25, 0.75], ".0%") == "50% (25% to 75%)"
    assert common.spread([1.0, np.nan, np.inf]) == "not finite in 2 of 3"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["7"], "there are questions 1 to 6, got 7."),
        (["0", "2", "9"], "there are questions 1 to 6, got 0, 9."),
        (["one"], "argument question: invalid int value: 'one'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0."),
        (
            ["--out", __file__],
            f"--out {__file__} is a file; it must be a folder, or not exist yet.",
        ),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command.main(argv)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


def test_interrupt(monkeypatch, tmp_path, capsys):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(epsilon, "run", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        command.main(["1", "--out", str(tmp_path)])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "stopped.\n"
