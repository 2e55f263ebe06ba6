"""Killed runs and damaged checkpoints: nothing is lost, and all damage is reported."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from train_examples.common import checkpoint
from train_examples.common.config import Config
from train_examples.common.errors import UserError
from train_examples.common.training import ONE_DEVICE, fit
from train_examples.digits import __main__ as command
from train_examples.digits import run
from train_examples.digits.run import train
from train_examples.digits.train import train_step

ROOT = Path(__file__).parent.parent
EPOCHS = 5
KILLS = 3
CONFIG = Config(epochs=EPOCHS, batch_size=256)


def restored(out):
    """Return the result of the finished run in a folder."""
    config = replace(CONFIG, out=out, resume=True)
    return train(config)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """The environment of processes that share a compilation cache with this one.

    Most of a short run's time is the compiler's.
    """
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)
    environment = {name.upper(): str(value) for name, value in options.items()}
    yield {**environment, "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once):
    """An undisturbed run: its result and its options."""
    config = replace(CONFIG, out=tmp_path_factory.mktemp("whole"))
    return train(config), config


def assert_same(result, wanted):
    jax.tree.map(
        np.testing.assert_array_equal,
        (result.state.params, result.state.batch_stats, result.state.opt_state),
        (wanted.state.params, wanted.state.batch_stats, wanted.state.opt_state),
    )
    assert result.history == wanted.history


def test_a_run_killed_at_random_moments_ends_bit_identical(whole, compiled_once, tmp_path):
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
            env={**os.environ, **compiled_once},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kills < KILLS:
            # Wait for something new in the folder, so that every start makes progress, and then for
            # a random moment: in a step, in an evaluation, while a checkpoint is being written.
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
    """Restore as a resumed run does, into a state like that of the `wanted` result."""
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
    assert error.rstrip().endswith(f"continuing from that of epoch {EPOCHS - 1}.")
    assert_is_before_the_last(state, history, wanted)


def edit(path, change):
    """Change the value in a JSON file."""
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
NOTES = "its history or options have changed since they were written"
REASONS = {
    "history": NOTES,
    "renamed key": NOTES,
    "options": NOTES,
    "checksum": "its arrays have changed since they were written",
    "history gone": (
        '\'Item "history" was not found in the checkpoint. Available items: '
        "[\\'options\\', \\'state\\', \\'checksums\\']'"
    ),
    "history empty": NOTES,
    "another epoch's": f"it holds epoch {EPOCHS - 1}",
}


@pytest.mark.parametrize("part", EDITS)
def test_changes_on_the_disk_are_detected(whole, tmp_path, capsys, part):
    wanted, config = whole
    config = replace(config, out=copy_of(config.out, tmp_path / "out"))
    EDITS[part](config.out / "checkpoints" / str(EPOCHS))
    state, history = restored_with(config, wanted)
    assert capsys.readouterr().err == (
        f"the checkpoint of epoch {EPOCHS} in {config.out} is damaged ({REASONS[part]}); "
        f"continuing from that of epoch {EPOCHS - 1}.\n"
    )
    assert_is_before_the_last(state, history, wanted)
    # It is removed, so that it can be written again.
    assert not (config.out / "checkpoints" / str(EPOCHS)).exists()


def test_where_no_checkpoint_is_intact_the_error_says_so(whole, tmp_path):
    wanted, config = whole
    out = copy_of(config.out, tmp_path / "out")
    for epoch in (EPOCHS - 1, EPOCHS):
        for path in files(out, epoch):
            DAMAGE["removed"](path)
    before = sorted((out / "checkpoints").rglob("*"))
    with pytest.raises(UserError) as caught:
        restored_with(replace(config, out=out), wanted)
    text = str(caught.value)
    assert text.startswith(f"--resume: no checkpoint in {out} is intact (that of epoch {EPOCHS}: ")
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


def test_a_run_that_is_interrupted(whole, tmp_path, monkeypatch, capsys):
    wanted, config = whole
    last = int(wanted.state.step) * 2 // EPOCHS + 1

    def step(state, images, labels):
        if int(state.step) == last:
            raise KeyboardInterrupt
        return train_step(state, images, labels)

    monkeypatch.setattr(run, "fit", partial(fit, backend=ONE_DEVICE._replace(step=step)))
    options = ["--epochs", str(EPOCHS), "--batch-size", str(config.batch_size)]
    with pytest.raises(SystemExit) as exit_info:
        command.main([*options, "--out", str(tmp_path)])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == (
        "stopped; the same command with --resume continues after the last complete epoch.\n"
    )
    monkeypatch.undo()
    assert_same(restored(tmp_path), wanted)


def test_a_run_that_is_interrupted_before_its_first_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--out", str(tmp_path)])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == (
        "stopped; no epoch was complete yet, so start the same command again.\n"
    )
