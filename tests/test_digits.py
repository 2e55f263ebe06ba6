"""The digits example: a run from end to end, a run that is stopped and resumed, its errors."""

import contextlib
import dataclasses
import io
import re

import jax
import numpy as np
import pytest
from matplotlib import image

from train_examples.common.config import Config
from train_examples.common.data import digits
from train_examples.common.errors import UserError
from train_examples.common.training import correct, evaluate
from train_examples.digits import __main__ as command
from train_examples.digits.__main__ import parse_args
from train_examples.digits.run import train

EPOCHS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run from the command line: its result, what it printed, and its folder."""
    out = tmp_path_factory.mktemp("run")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = command.main(["--epochs", str(EPOCHS), "--out", str(out)])
    return result, printed.getvalue(), out


def test_learns(run):
    result, _, _ = run
    assert len(result.history.test_accuracy) == EPOCHS
    assert result.history.test_accuracy[-1] == result.accuracy["moving"]
    assert result.accuracy["moving"] > 0.95
    assert result.accuracy["batch"] > 0.95
    assert np.mean(result.history.loss[-20:]) < 0.1 * result.history.loss[0]


def test_prints_both_accuracies(run):
    result, printed, _ = run
    # What a terminal draws between the cells depends on its encoding.
    assert re.search(rf"the moving averages\W+{result.accuracy['moving']:.2%}", printed)
    assert re.search(rf"own statistics\W+{result.accuracy['batch']:.2%}", printed)


def test_ends_with_the_health_of_the_norms(run):
    _, printed, _ = run
    assert printed.endswith("The running statistics are healthy.\n")
    assert re.search(r"^BatchNorm_3 +\d+ ", printed, re.M)


def test_draws_pictures(run):
    _, _, out = run
    pictures = sorted(out.glob("*.png"))
    assert [p.name for p in pictures] == ["accuracy.png", "loss.png", "moving_averages.png"]
    for picture in pictures:
        pixels = image.imread(picture)
        assert pixels.shape[0] > 400 and pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.01


def test_moving_averages_settle(run):
    result, _, _ = run
    moving = jax.tree.leaves(result.state.batch_stats)
    true = jax.tree.leaves(result.training_statistics)
    for a, b in zip(moving, true, strict=True):
        np.testing.assert_allclose(a, b, rtol=0.2, atol=0.2)


def test_evaluation_uses_the_statistics_it_names(run):
    result, _, _ = run
    _, _, images, labels = digits()
    without_averages = result.state.replace(
        batch_stats=jax.tree.map(lambda leaf: leaf * np.nan, result.state.batch_stats)
    )
    assert evaluate(without_averages, images, labels, 64, "batch") == result.accuracy["batch"]
    assert evaluate(without_averages, images, labels, 64, "moving") < 0.2


def test_padding_does_not_count(run):
    result, _, _ = run
    _, _, images, labels = digits()
    images, labels = images[:50], labels[:50]
    mask = np.arange(50) < 40
    padded = np.where(mask[:, None, None, None], images, np.nan)
    alone = correct(result.state, images[:40], labels[:40], mask[:40], "batch")
    assert correct(result.state, padded, labels, mask, "batch") == alone
    assert alone > 35


def test_resumed_run_ends_bit_identical(run, tmp_path):
    whole, _, _ = run
    config = Config(epochs=EPOCHS, out=tmp_path)
    half = train(config, stop_after_epoch=EPOCHS // 2)
    assert int(half.state.step) == int(whole.state.step) // 2
    with pytest.raises(AssertionError):
        assert_same(half.state.params, whole.state.params)

    resumed = train(dataclasses.replace(config, resume=True))
    assert_same(resumed.state.params, whole.state.params)
    assert_same(resumed.state.batch_stats, whole.state.batch_stats)
    assert_same(resumed.state.opt_state, whole.state.opt_state)
    assert int(resumed.state.step) == int(whole.state.step)
    assert resumed.history == whole.history
    assert resumed.accuracy == whole.accuracy


def test_resuming_a_finished_run_changes_nothing(run):
    whole, _, out = run
    again = train(Config(epochs=EPOCHS, out=out, resume=True))
    assert_same(again.state.params, whole.state.params)
    assert again.accuracy == whole.accuracy


def test_bfloat16_runs(tmp_path):
    result = train(Config(epochs=1, dtype="bfloat16", out=tmp_path))
    assert np.isfinite(result.history.loss).all()
    assert result.history.loss[-1] < result.history.loss[0]


@pytest.mark.parametrize(
    "option, stored, given",
    [
        ("--epochs", str(EPOCHS), "7"),
        ("--batch-size", "64", "32"),
        ("--learning-rate", "0.2", "0.1"),
        ("--seed", "0", "1"),
        ("--dtype", "float32", "bfloat16"),
    ],
)
def test_resume_refuses_other_options(run, option, stored, given):
    _, _, out = run
    argv = ["--epochs", str(EPOCHS), "--out", str(out), "--resume", option, given]
    with pytest.raises(SystemExit) as exit_info:
        command.main(argv)
    assert str(exit_info.value) == (
        f"error: --resume needs the options that the run in {out} began with, since they determine "
        f"the order of the data and the learning rate: {option} is {given}, the checkpoint has "
        f"{stored}."
    )


def test_resume_without_a_checkpoint(tmp_path):
    for out in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as exit_info:
            command.main(["--out", str(out), "--resume"])
        assert str(exit_info.value) == (
            f"error: --resume: there is no checkpoint in {out}; name the folder of the run to "
            f"continue by --out, or start a new run without --resume."
        )
        assert not (out / "checkpoints").exists()


def test_new_run_keeps_old_checkpoints(run):
    _, _, out = run
    before = sorted(out.rglob("*"))
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--out", str(out)])
    assert str(exit_info.value) == (
        f"error: --out {out} has checkpoints of an earlier run: continue it by --resume, or name "
        f"another folder."
    )
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0."),
        (["--batch-size", "-3"], "--batch-size must be at least 1, got -3."),
        (["--learning-rate", "-1"], "--learning-rate must be positive and finite, got -1.0."),
        (["--learning-rate", "nan"], "--learning-rate must be positive and finite, got nan."),
        (["--seed", "-1"], "--seed must be in [0, 2^32), got -1."),
        (["--dataset", "mnist"], "--dataset mnist needs --data-dir, the folder of its files."),
        (
            ["--data-dir", "x"],
            "--data-dir x is for --dataset mnist or cifar10: the digits come with scikit-learn.",
        ),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (
            ["--out", __file__],
            f"--out {__file__} is a file; it must be a folder, or not exist yet.",
        ),
    ],
)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_args(argv)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {message}")


def test_batch_larger_than_the_training_set(tmp_path):
    with pytest.raises(UserError) as error:
        train(Config(batch_size=1438, out=tmp_path))
    assert str(error.value) == (
        "--batch-size must be at most 1437, the number of training images, got 1438."
    )
    assert list(tmp_path.iterdir()) == []


def assert_same(a, b):
    """Compare bit by bit; a NaN here would mean that training failed."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert np.isfinite(x).all()
