"""Runs that are killed, checkpoints that are damaged: nothing is lost, and nothing goes unsaid."""

import contextlib
import json
import logging
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from train_examples.digits import __main__ as command
from train_examples.digits import checkpoint, storage
from train_examples.digits import train as training
from train_examples.digits.config import Config, UserError
from train_examples.digits.history import History
from train_examples.digits.train import ONE_DEVICE, train

ROOT = Path(__file__).parent.parent
EPOCHS = 5
KILLS = 3
CONFIG = Config(epochs=EPOCHS, batch_size=256)


def restored(out):
    """What the folder of a finished run holds."""
    config = replace(CONFIG, out=out, resume=True)
    return train(config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs."""
    config = replace(CONFIG, out=tmp_path_factory.mktemp("whole"))
    return train(config), config


def assert_same(result, wanted):
    jax.tree.map(
        np.testing.assert_array_equal,
        (result.state.params, result.state.batch_stats, result.state.opt_state),
        (wanted.state.params, wanted.state.batch_stats, wanted.state.opt_state),
    )
    assert result.history == wanted.history


def test_a_run_killed_at_random_moments_ends_bit_identical(whole, tmp_path):
    wanted, _ = whole
    out = tmp_path / "killed"
    command = [
        *(sys.executable, "-m", "train_examples.digits", "--out", str(out)),
        *("--epochs", str(EPOCHS), "--batch-size", str(CONFIG.batch_size)),
    ]
    rng = random.Random(0)
    folder = out / "checkpoints"
    kills = 0
    while True:
        written = sorted(folder.iterdir()) if folder.is_dir() else []
        resume = ["--resume"] if any(step.name.isdigit() for step in written) else []
        process = subprocess.Popen(
            [*command, *resume],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kills < KILLS:
            # Once something new is in the folder, so that every start gets on, then any moment: in
            # a step, in an evaluation, while the next checkpoint is being written.
            while process.poll() is None and (
                not folder.is_dir() or sorted(folder.iterdir()) == written
            ):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        kills += 1
    assert kills == KILLS
    assert_same(restored(out), wanted)


def copy_of(out, to):
    subprocess.run(["cp", "-r", str(out), str(to)], check=True)
    return to


def files(folder, epoch):
    return sorted(p for p in (folder / "checkpoints" / str(epoch)).rglob("*") if p.is_file())


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "corrupted": lambda path: path.write_bytes(bytes(255 - byte for byte in path.read_bytes())),
    "removed": lambda path: path.unlink(),
}


def restored_with(config, wanted):
    """Restores as a resumed run does, into a state like the `wanted` result's."""
    config = replace(config, resume=True)
    with checkpoint.open_manager(config) as manager:
        return checkpoint.restore(manager, wanted.state, config)


def assert_is_before_the_last(state, history, wanted):
    assert history.test_accuracy == wanted.history.test_accuracy[:-1]
    assert int(state.step) == int(wanted.state.step) * (EPOCHS - 1) // EPOCHS


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(whole, tmp_path, capsys, damage):
    wanted, config = whole
    out = copy_of(config.out, tmp_path / "out")
    assert sorted(p.name for p in (out / "checkpoints").iterdir() if p.name.isdigit()) == [
        str(EPOCHS - 1),
        str(EPOCHS),
    ]
    for path in files(out, EPOCHS):
        DAMAGE[damage](path)
    state, history = restored_with(replace(config, out=out), wanted)
    error = capsys.readouterr().err
    assert f"the checkpoint of epoch {EPOCHS} in {out} is damaged (" in error
    assert error.rstrip().endswith(f"going on from that of epoch {EPOCHS - 1}.")
    assert_is_before_the_last(state, history, wanted)


def edit(path, change):
    """Changes what a file of JSON holds."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def renamed_key(history):
    history["test_accuracies"] = history.pop("test_accuracy")


EDITS = {
    "history": lambda folder: edit(
        folder / "history" / "metadata", lambda history: history["loss"].reverse()
    ),
    "renamed key": lambda folder: edit(folder / "history" / "metadata", renamed_key),
    "options": lambda folder: edit(
        folder / "options" / "metadata", lambda options: options.update(seed=3)
    ),
    "checksum": lambda folder: edit(
        folder / "checksums" / "metadata", lambda sums: sums.update(state=sums["notes"])
    ),
    "history gone": lambda folder: shutil.rmtree(folder / "history"),
    "history empty": lambda folder: (folder / "history" / "metadata").write_text("null"),
    "another epoch's": lambda folder: (
        shutil.rmtree(folder),
        shutil.copytree(folder.with_name(str(EPOCHS - 1)), folder),
    ),
}
NOTES = "its history or options are not those that were written"
REASONS = {
    "history": NOTES,
    "renamed key": NOTES,
    "options": NOTES,
    "checksum": "its numbers are not those that were written",
    "history gone": (
        '\'Item "history" was not found in the checkpoint. Available items: '
        "[\\'options\\', \\'state\\', \\'checksums\\']'"
    ),
    "history empty": NOTES,
    "another epoch's": f"it is that of epoch {EPOCHS - 1}",
}


@pytest.mark.parametrize("part", EDITS)
def test_what_changed_on_the_disk_is_noticed(whole, tmp_path, capsys, part):
    wanted, config = whole
    config = replace(config, out=copy_of(config.out, tmp_path / "out"))
    EDITS[part](config.out / "checkpoints" / str(EPOCHS))
    state, history = restored_with(config, wanted)
    assert capsys.readouterr().err == (
        f"the checkpoint of epoch {EPOCHS} in {config.out} is damaged ({REASONS[part]}); going on "
        f"from that of epoch {EPOCHS - 1}.\n"
    )
    assert_is_before_the_last(state, history, wanted)
    # It is removed, so that it can be written anew.
    assert not (config.out / "checkpoints" / str(EPOCHS)).exists()


def test_where_no_checkpoint_is_whole_the_error_says_so(whole, tmp_path):
    wanted, config = whole
    out = copy_of(config.out, tmp_path / "out")
    for epoch in (EPOCHS - 1, EPOCHS):
        for path in files(out, epoch):
            DAMAGE["removed"](path)
    before = sorted((out / "checkpoints").rglob("*"))
    with pytest.raises(UserError) as caught:
        restored_with(replace(config, out=out), wanted)
    text = str(caught.value)
    assert text.startswith(f"--resume: no checkpoint in {out} is whole (that of epoch {EPOCHS}: ")
    assert text.endswith("Start a new run in another folder.")
    assert sorted((out / "checkpoints").rglob("*")) == before  # nothing is removed


def test_the_checksum_covers_every_leaf():
    state = {"a": np.arange(3.0), "b": np.float32(1)}
    checksums = {
        checkpoint._checksum(one)
        for one in (
            state,
            {**state, "a": np.array([0, 1, -2.0])},
            {**state, "a": np.array([0, 1, 2.0000002])},
            {**state, "b": np.int32(1)},
            {"a": state["a"], "c": state["b"]},
            {**state, "a": state["a"][:, None]},
        )
    }
    assert len(checksums) == 6


def test_a_second_run_in_the_folder_of_a_first_is_refused(tmp_path):
    first = replace(CONFIG, out=tmp_path)
    with checkpoint.open_manager(first) as manager:
        with pytest.raises(SystemExit) as exit_info:
            command.main(["--out", str(tmp_path)])
        assert exit_info.value.code == (
            f"error: --out {tmp_path}: another run is writing there; wait for its end, or name "
            f"another folder."
        )
        # The first one is not disturbed.
        history = History(test_accuracy=[0.5])
        checkpoint.save(manager, 1, {"a": np.zeros(3)}, history, first)
    with checkpoint.open_manager(replace(first, resume=True)) as manager:
        assert checkpoint.restore(manager, {"a": np.zeros(3)}, first)[1] == history


@contextlib.contextmanager
def files_of_at_most(size):
    """Lets the system refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_the_disk_does_not_take(tmp_path, caplog):
    config = replace(CONFIG, out=tmp_path)
    state = {"a": np.random.default_rng(0).random(10_000)}
    whole = History(test_accuracy=[0.5])
    with checkpoint.open_manager(config) as manager:
        checkpoint.save(manager, 1, state, whole, config)
        with (
            caplog.at_level(logging.ERROR),
            pytest.raises(UserError) as error,
            files_of_at_most(30_000),
        ):
            checkpoint.save(manager, 2, state, History(test_accuracy=[0.5, 0.6]), config)
    assert str(error.value) == (
        f"--out {tmp_path}: the checkpoint of epoch 2 cannot be written there (File too large). "
        f"Mend that, or name another folder; what was written before is still whole."
    )
    assert caplog.records == []
    config = replace(config, resume=True)
    with checkpoint.open_manager(config) as manager:
        restored, history = checkpoint.restore(manager, state, config)
        np.testing.assert_array_equal(restored["a"], state["a"])
        assert history == whole
        checkpoint.save(manager, 2, state, history, config)


def test_reasons_of_the_system():
    full = "Failed to write 9 bytes to file 17: No space left on device [os_error_code='28']"
    for error, reason in (
        (ValueError(f"RESOURCE_EXHAUSTED: {full}"), "No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("a reason without a number"), "a reason without a number"),
    ):
        with pytest.raises(UserError) as caught, storage.writing("pictures", Path("out")):
            raise error
        assert str(caught.value) == (
            f"--out out: pictures cannot be written there ({reason}). Mend that, or name another "
            f"folder; what was written before is still whole."
        )
    # Anything else is a mistake of the program, or of another process.
    with pytest.raises(ValueError, match="Gloo"), storage.writing("pictures", Path("out")):
        raise ValueError("Gloo: connection closed by peer")


@pytest.mark.parametrize(
    "out, reason", [("file/out", "Not a directory"), ("x" * 300, "File name too long")]
)
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_that_cannot_be_written(tmp_path, out, reason, resume):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--out", str(tmp_path / out), *resume])
    assert exit_info.value.code == (
        f"error: --resume: there is no checkpoint in {tmp_path / out}; name the folder of the run "
        f"to go on with by --out, or start a new run without --resume."
        if resume
        else f"error: --out {tmp_path / out}: checkpoints cannot be written there ({reason}). Mend "
        f"that, or name another folder; what was written before is still whole."
    )


def test_pictures_that_cannot_be_written(whole, tmp_path, monkeypatch):
    result, _ = whole
    monkeypatch.setattr(command, "train", lambda config: result)
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--out", str(tmp_path)])
    assert exit_info.value.code == (
        f"error: --out {tmp_path}: pictures cannot be written there (Is a directory). Mend that, "
        f"or name another folder; what was written before is still whole."
    )


@pytest.mark.parametrize(
    "epochs, message",
    [
        (0, "stopped; no epoch was whole yet, so start the same command again.\n"),
        (2, "stopped; the same command with --resume goes on after the last whole epoch.\n"),
    ],
)
def test_a_run_that_is_interrupted(whole, tmp_path, monkeypatch, capsys, epochs, message):
    wanted, config = whole
    last = int(wanted.state.step) * epochs // EPOCHS + 1

    def step(state, images, labels):
        if int(state.step) == last:
            raise KeyboardInterrupt
        return ONE_DEVICE.step(state, images, labels)

    monkeypatch.setattr(training, "ONE_DEVICE", ONE_DEVICE._replace(step=step))
    options = ["--epochs", str(EPOCHS), "--batch-size", str(config.batch_size)]
    with pytest.raises(SystemExit) as exit_info:
        command.main([*options, "--out", str(tmp_path)])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == message
    monkeypatch.undo()
    if epochs > 0:
        assert_same(restored(tmp_path), wanted)
