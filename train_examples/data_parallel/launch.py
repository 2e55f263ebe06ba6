"""Starts processes of a run, and watches them: when one fails, all end, with one clear error."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

from train_examples.data_parallel.config import Config
from train_examples.data_parallel.processes import EXPLAINED, JOIN, LOST
from train_examples.digits.config import UserError

POLL = 0.1
# Seconds that a process has to end once its launcher lets go of it.
GRACE = 10


def launch(argv: Sequence[str], config: Config) -> None:
    """Runs the processes of `config` that belong here, given its command line: one, or all.

    On a machine of several, one of them runs here: the launcher is there for the error that a
    process cannot print, as JAX's runtime ends it where the coordinator is lost.
    """
    if config.process_id == 0:
        check_port(str(config.coordinator))
    if config.process_id is not None:
        ids, options, environment = [config.process_id], [], None
    else:
        ids = list(range(config.processes))
        options = ["--coordinator", f"localhost:{free_port()}"]
        # They would all ask for the same GPU.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "train_examples.data_parallel.worker", *argv, *options]
    workers = {
        # In a session of its own, as Ctrl-C is for the launcher.
        k: subprocess.Popen(
            [*command, "--process-id", str(k)],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        for k in ids
    }
    try:
        failed = first_failure(workers)
    finally:
        end(workers.values())
    if failed is None:
        return
    if workers[failed].returncode == EXPLAINED:
        sys.exit(EXPLAINED)
    sys.exit(explanation(failed, workers[failed], config))


def first_failure(workers: dict[int, subprocess.Popen]) -> int | None:
    """Waits for the end of all, or of one that fails, and returns the number of that one."""
    while True:
        statuses = {k: worker.poll() for k, worker in workers.items()}
        failed = [k for k, status in statuses.items() if status not in (None, 0)]
        if failed:
            # Rather the one that was killed than those that failed without it.
            return min(failed, key=lambda k: (is_consequence(workers[k]), workers[k].returncode))
        if None not in statuses.values():
            return None
        time.sleep(POLL)


def is_consequence(worker: subprocess.Popen) -> bool:
    """Whether a process ended as another one is gone: by itself, or by JAX's runtime."""
    return worker.returncode in (LOST, -signal.SIGABRT)


def end(workers: Iterable[subprocess.Popen]) -> None:
    """Ends the processes that still run, in bounded time."""
    for worker in workers:
        # It ends by that: see `end_with_launcher`. JAX has another use for SIGTERM.
        assert worker.stdin is not None
        worker.stdin.close()
    deadline = time.monotonic() + GRACE
    for worker in workers:
        try:
            worker.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def explanation(process: int, worker: subprocess.Popen, config: Config) -> str:
    """What to tell of a process that failed."""
    if is_consequence(worker):
        what = (
            f"cannot go on: another process is gone, does not answer, or has not started within "
            f"{JOIN} seconds."
        )
    elif worker.returncode < 0:
        name = signal.Signals(-worker.returncode).name
        what = f"was killed by {name}, and the others cannot go on without it."
    else:
        what = f"failed with status {worker.returncode}, and the others cannot go on without it."
    return (
        f"error: process {process} of {config.processes} {what} Start them all again: --resume "
        f"--out {config.out} goes on after the last whole epoch."
    )


def check_port(coordinator: str) -> None:
    """Refuses the address of a coordinator where something else listens."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"--coordinator {coordinator}: process 0 cannot listen there ({reason}); give all "
            f"processes another port."
        ) from None


def free_port() -> int:
    """A port where nothing listens."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
