"""The folder of a run: its lock, and the errors of its disk."""

import contextlib
import logging
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from train_examples.common import checkpoint, storage
from train_examples.common.config import Config
from train_examples.common.errors import UserError
from train_examples.common.history import History
from train_examples.digits import __main__ as command
from train_examples.digits.run import Result


def test_a_second_run_in_the_folder_of_a_first_is_refused(tmp_path):
    first = Config(out=tmp_path)
    with checkpoint.open_manager(first) as manager:
        with pytest.raises(SystemExit) as exit_info:
            command.main(["--out", str(tmp_path)])
        assert exit_info.value.code == (
            f"error: --out {tmp_path}: another run is writing there; wait until it ends, or name "
            f"another folder."
        )
        # The first run is not affected.
        history = History(test_accuracy=[0.5])
        checkpoint.save(manager, 1, {"a": np.zeros(3)}, history, first)
    with checkpoint.open_manager(replace(first, resume=True)) as manager:
        assert checkpoint.restore(manager, {"a": np.zeros(3)}, first)[1] == history


@contextlib.contextmanager
def files_of_at_most(size):
    """Make the system refuse larger files, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path, caplog):
    config = Config(out=tmp_path)
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
        f"Fix that, or name another folder; what was written before is intact."
    )
    assert caplog.records == []
    config = replace(config, resume=True)
    with checkpoint.open_manager(config) as manager:
        restored, history = checkpoint.restore(manager, state, config)
        np.testing.assert_array_equal(restored["a"], state["a"])
        assert history == whole
        checkpoint.save(manager, 2, state, history, config)


def test_the_reason_of_the_operating_system_is_given():
    full = "Failed to write 9 bytes to file 17: No space left on device [os_error_code='28']"
    for error, reason in (
        (ValueError(f"RESOURCE_EXHAUSTED: {full}"), "No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("a reason without a number"), "a reason without a number"),
    ):
        with pytest.raises(UserError) as caught, storage.writing("pictures", Path("out")):
            raise error
        assert str(caught.value) == (
            f"--out out: pictures cannot be written there ({reason}). Fix that, or name another "
            f"folder; what was written before is intact."
        )
    # Anything else is a bug, or comes from another process.
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
        f"to continue by --out, or start a new run without --resume."
        if resume
        else f"error: --out {tmp_path / out}: checkpoints cannot be written there ({reason}). Fix "
        f"that, or name another folder; what was written before is intact."
    )


def test_pictures_that_cannot_be_written(tmp_path, monkeypatch):
    history = History(loss=[1.0], train_accuracy=[0.4], test_accuracy=[0.5])
    statistics = {"BatchNorm_0": {"mean": np.zeros(4), "var": np.ones(4)}}
    history.record_moving(0, 1, statistics)
    sample = np.zeros((1, 8, 8, 1), np.float32)
    result = Result(None, history, {"moving": 0.5, "batch": 0.5}, sample, statistics)
    monkeypatch.setattr(command, "train", lambda config: result)
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--out", str(tmp_path)])
    assert exit_info.value.code == (
        f"error: --out {tmp_path}: pictures cannot be written there (Is a directory). Fix that, "
        f"or name another folder; what was written before is intact."
    )
