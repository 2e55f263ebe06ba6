"""The recalibration example: its command, and that recalibration helps where it should."""

import contextlib
import io

import jax.numpy as jnp
import numpy as np
import pytest

from train_examples.common.data import digits
from train_examples.recalibrate import __main__ as command
from train_examples.recalibrate import compare, ema, passes


@pytest.fixture(scope="module")
def run():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cases = command.main(["--epochs", "4"])
    return {case.name: case for case in cases}, printed.getvalue()


def test_recalibration_helps_where_the_running_averages_fail(run):
    cases, _ = run
    faint = cases["trained weights, faint images"]
    assert faint.running.accuracy < 0.5 and faint.recalibrated.accuracy > 0.85
    averaged = cases["averaged weights"]
    assert averaged.recalibrated.loss < averaged.running.loss
    trained = cases["trained weights"]
    assert min(trained.running.accuracy, trained.recalibrated.accuracy) > 0.95


def test_prints_every_score(run):
    cases, printed = run
    for case in cases.values():
        for scores in (case.running, case.recalibrated):
            assert f"{scores.accuracy:.2%}" in printed and f"{scores.loss:.4f}" in printed


def test_averages_the_parameters_after_the_start(monkeypatch):
    class State:
        def __init__(self, step):
            self.step, self.params = step, {"w": jnp.asarray(float(step**2))}

    def fake_step(state, images, labels):
        return State(state.step + 1), None

    monkeypatch.setattr(compare, "train_step", fake_step)
    step, state = compare.AveragingStep(start=2), State(0)
    for _ in range(5):
        state, _ = step(state, None, None)
    np.testing.assert_allclose(step.params["w"], (9 + 16 + 25) / 3, rtol=1e-6)


def test_an_ema_of_weights_and_statistics(monkeypatch):
    class State:
        def __init__(self, step):
            self.step, self.params = step, jnp.asarray(float(step**2))
            self.batch_stats = 10 * self.params

    def fake_step(state, images, labels):
        return State(state.step + 1), None

    monkeypatch.setattr(ema, "train_step", fake_step)
    step, state = ema.EmaStep([0.0, 0.5], keep_after=(2, 3)), State(0)
    for _ in range(4):
        state, _ = step(state, None, None)
    assert list(step.kept) == [2, 3]
    last, averages = step.kept[3]
    assert last == {"params": 9, "batch_stats": 90}
    assert averages[0] == last
    # The weights of the three steps are 1, 2 and 4 parts of 7.
    wanted = (1 + 2 * 4 + 4 * 9) / 7
    np.testing.assert_allclose(averages[1]["params"], wanted, rtol=1e-6)
    np.testing.assert_allclose(averages[1]["batch_stats"], 10 * wanted, rtol=1e-6)


def test_the_command_for_an_ema_prints_what_it_measures(monkeypatch):
    monkeypatch.setattr(ema, "DECAYS", (0.99,))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = ema.main(["--epochs", "1", "--seeds", "1"])
    assert result.shape == (1, 2, 1, len(ema.STATISTICS), 2)
    # The three sets of statistics are different ones.
    assert len(np.unique(result[..., 1])) == result[..., 1].size
    for accuracy, loss in result.reshape(-1, 2):
        assert f"{accuracy:.2%}" in printed.getvalue() and f"{loss:.4f}" in printed.getvalue()
    with pytest.raises(SystemExit, match=r"^error: --seeds must be at least 1, got 0.$"):
        ema.main(["--seeds", "0"])


def test_the_command_for_few_passes_prints_their_errors(monkeypatch):
    monkeypatch.setattr(passes, "BATCHES", ((479, False),))
    monkeypatch.setattr(passes, "PASSES", (1, None))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        rows = passes.main(["--epochs", "1"])
    assert [(row.images, row.passes) for row in rows] == [
        (images, number) for images in ("usual", "faint") for number in ("1", "exact")
    ]
    for one, exact in (rows[:2], rows[2:]):
        # Float32 rounds at 6e-8, a few times in each layer.
        assert exact.change < 1e-5 < 1e-4 < one.change < 0.1
    for row in rows:
        assert f"{row.change:.1e}" in printed.getvalue()
        assert f"{row.accuracy:.2%}" in printed.getvalue()


def test_pieces_hold_each_image_once():
    images = digits().test_images
    pieces = list(compare.pieces(images, 64))
    assert [len(piece) for piece in pieces] == [64] * 5 + [40]
    np.testing.assert_array_equal(np.concatenate(pieces), images)


def test_a_user_error_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: --batch-size must be at most 1437"):
        command.main(["--batch-size", "100000"])
