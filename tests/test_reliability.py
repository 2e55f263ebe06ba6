"""Runs that are killed, checkpoints that are damaged: nothing is lost, and nothing goes unsaid."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from train_examples.digits import checkpoint
from train_examples.digits.config import Config, UserError
from train_examples.digits.train import train

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
    result = restored(out)
    error = capsys.readouterr().err
    assert f"the checkpoint of epoch {EPOCHS} in {out} is damaged (" in error
    assert error.rstrip().endswith(f"going on from that of epoch {EPOCHS - 1}.")
    assert_same(result, wanted)


def test_numbers_that_changed_on_the_disk_are_noticed(whole, tmp_path, capsys):
    wanted, config = whole
    out = copy_of(config.out, tmp_path / "out")
    (digest,) = (
        path for path in files(out, EPOCHS) if '{"sha256": ' in path.read_text(errors="ignore")
    )
    stored = json.loads(digest.read_text())
    digest.write_text(json.dumps({"sha256": stored["sha256"][::-1]}))
    assert_same(restored(out), wanted)
    assert "(its numbers are not those that were written)" in capsys.readouterr().err
    # Written anew, it can be gone on with.
    assert_same(restored(out), wanted)
    assert "damaged" not in capsys.readouterr().err


def test_where_no_checkpoint_is_whole_the_error_says_so(whole, tmp_path):
    _, config = whole
    out = copy_of(config.out, tmp_path / "out")
    for epoch in (EPOCHS - 1, EPOCHS):
        for path in files(out, epoch):
            DAMAGE["removed"](path)
    before = sorted((out / "checkpoints").rglob("*"))
    with pytest.raises(UserError) as caught:
        restored(out)
    text = str(caught.value)
    assert text.startswith(f"--resume: no checkpoint in {out} is whole (that of epoch {EPOCHS}: ")
    assert text.endswith("Start a new run in another folder.")
    assert sorted((out / "checkpoints").rglob("*")) == before  # nothing is removed


def test_the_digest_sees_every_leaf():
    state = {"a": np.arange(3.0), "b": np.float32(1)}
    digests = {
        checkpoint._digest(one)
        for one in (
            state,
            {**state, "a": np.array([0, 1, -2.0])},
            {**state, "a": np.array([0, 1, 2.0000002])},
            {**state, "b": np.int32(1)},
            {"a": state["a"], "c": state["b"]},
            {**state, "a": state["a"][:, None]},
        )
    }
    assert len(digests) == 6
