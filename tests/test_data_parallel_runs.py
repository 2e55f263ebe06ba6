"""Runs of the data-parallel example in two processes: one is killed, and the run is resumed."""

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from train_examples.common.errors import UserError
from train_examples.common.training import fit, network
from train_examples.data_parallel import launch
from train_examples.data_parallel.batches import data_mesh
from train_examples.data_parallel.compare import distance
from train_examples.data_parallel.config import parse_args
from train_examples.data_parallel.train import Result, train

ROOT = Path(__file__).parent.parent
EPOCHS = 3
# Each of two devices has 120 rows; the last row of the second is padding.
OPTIONS = [f"--epochs={EPOCHS}", "--batch-size=239", "--dtype=float64"]
TWO = ["--processes=2", "--devices=1"]
TOLERANCE = 1e-9

# Seconds. The connections of a killed process close, so the others notice soon; at the latest when
# JAX's runtime misses its heartbeat.
NOTICE = 60
LIMIT = 120


@pytest.fixture(scope="module", autouse=True)
def compiles_fast(tmp_path_factory):
    """Most of a short run's time is the compiler's: here, and in processes, which share a cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, compiles_fast):
    out = tmp_path_factory.mktemp("one_device")
    config = parse_args([*OPTIONS, f"--out={out}"])
    with jax.enable_x64(True):
        state, history, _ = fit(network(config), config)
    return Result(state, history, data_mesh(1))


def start(*argv):
    return subprocess.Popen(
        [sys.executable, "-m", "train_examples.data_parallel", *OPTIONS, *TWO, *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_checkpoint(out):
    deadline = time.monotonic() + LIMIT
    while not (out / "checkpoints" / "1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_run(got, wanted):
    assert distance(got.state, wanted.state) <= TOLERANCE
    assert got.history.test_accuracy == wanted.history.test_accuracy
    assert got.history.loss == pytest.approx(wanted.history.loss, rel=TOLERANCE)


def resume(out, *argv):
    return train(parse_args([*OPTIONS, "--resume", f"--out={out}", *argv]))


def test_host_that_is_killed(one_device, tmp_path):
    """Two commands, as on two hosts; the one that is killed is the coordinator."""
    both = "--mode=pmap", f"--coordinator=localhost:{launch.free_port()}", f"--out={tmp_path}"
    hosts = [start(*both, f"--process-id={k}") for k in range(2)]
    try:
        wait_for_checkpoint(tmp_path)
        hosts[0].kill()
        printed, _ = hosts[1].communicate(timeout=NOTICE)
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
    assert hosts[1].returncode == 1
    assert printed.splitlines()[-1] == (
        f"error: process 1 of 2 cannot go on: another process is gone, does not answer, or has "
        f"not started within 120 seconds. Start them all again: --resume --out {tmp_path} "
        f"continues after the last complete epoch."
    )
    # The run continues from its complete epochs, on other devices and in another mode.
    assert_same_run(resume(tmp_path, "--devices=3", "--mode=shard_map"), one_device)


def test_process_that_is_killed(one_device, monkeypatch, tmp_path):
    """The launcher says which process it was, and ends the other one."""
    workers = []

    class Worker(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, cwd=ROOT)
            workers.append(self)

    monkeypatch.setattr(launch.subprocess, "Popen", Worker)
    killed = []

    def kill():
        wait_for_checkpoint(tmp_path)
        workers[1].kill()
        killed.append(time.monotonic())

    argv = [*OPTIONS, *TWO, "--mode=shard_map", f"--out={tmp_path}"]
    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(SystemExit) as exit_info:
        launch.launch(argv, parse_args(argv))
    thread.join()
    assert time.monotonic() - killed[0] < NOTICE
    assert [worker.poll() for worker in workers].count(None) == 0
    assert workers[1].returncode == -signal.SIGKILL
    assert exit_info.value.code == (
        f"error: process 1 of 2 was killed by SIGKILL, and the others cannot go on without it. "
        f"Start them all again: --resume --out {tmp_path} continues after the last complete epoch."
    )
    monkeypatch.undo()

    resumed = start("--mode=jit", "--resume", f"--out={tmp_path}")
    printed, _ = resumed.communicate(timeout=LIMIT)
    assert resumed.returncode == 0, printed
    accuracy = one_device.history.test_accuracy[-1]
    assert printed.splitlines()[-1] == (
        f"test accuracy {accuracy:.2%} after {EPOCHS} epochs (mode jit, devices 2, processes 2)"
    )
    # Resuming a complete run reads it.
    assert_same_run(resume(tmp_path), one_device)


def test_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        where = f"localhost:{server.getsockname()[1]}"
        argv = [*TWO, f"--coordinator={where}", "--process-id=0"]
        with pytest.raises(UserError) as error:
            launch.launch(argv, parse_args(argv))
    assert str(error.value) == (
        f"--coordinator {where}: process 0 cannot listen there (Address already in use); give all "
        f"processes another port."
    )


def test_error_of_every_process(tmp_path):
    nowhere = start("--resume", f"--out={tmp_path}")
    printed, _ = nowhere.communicate(timeout=LIMIT)
    assert nowhere.returncode == 2
    assert f"error: --resume: there is no checkpoint in {tmp_path}" in printed
    assert "Traceback" not in printed
