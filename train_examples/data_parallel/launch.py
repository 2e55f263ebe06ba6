"""Start the processes of a run and watch them: when one fails, end all, with one clear error."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

from train_examples.common.errors import UserError
from train_examples.data_parallel.config import Config, how_to_resume
from train_examples.data_parallel.processes import EXPLAINED, JOIN, LOST

POLL = 0.1
# How many seconds a process has to end after its launcher has closed its standard input.
GRACE = 10


def launch(argv: Sequence[str], config: Config) -> None:
    """Run the processes of `config` on this machine: one if it has a `process_id`, or else all.

    A single process has a launcher too. When the coordinator is lost, JAX's runtime aborts the
    process, and only the launcher can print an error.

    Args:
      argv: the command line that `config` came from.
      config: the options.
    """
    if config.process_id == 0:
        check_port(str(config.coordinator))
    if config.process_id is not None:
        ids, options, environment = [config.process_id], [], None
    else:
        ids = list(range(config.processes))
        options = ["--coordinator", f"localhost:{free_port()}"]
        # On GPUs, every process would ask for the same ones.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "train_examples.data_parallel.worker", *argv, *options]
    workers = {
        # In a session of its own, so that only the launcher gets Ctrl-C.
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
    """Wait until all processes have ended or one has failed, and return its number."""
    while True:
        statuses = {k: worker.poll() for k, worker in workers.items()}
        failed = [k for k, status in statuses.items() if status not in (None, 0)]
        if failed:
            # If one was killed, the others failed because of it: report the one that was killed.
            return min(failed, key=lambda k: (is_consequence(workers[k]), workers[k].returncode))
        if None not in statuses.values():
            return None
        time.sleep(POLL)


def is_consequence(worker: subprocess.Popen) -> bool:
    """Return whether a process ended because another one is gone."""
    # By itself, or aborted by JAX's runtime.
    return worker.returncode in (LOST, -signal.SIGABRT)


def end(workers: Iterable[subprocess.Popen]) -> None:
    """End the processes that are still running, in bounded time."""
    for worker in workers:
        # This ends it, see `end_with_launcher`. SIGTERM would not: JAX handles it.
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
    """Return what to tell the user about a process that failed."""
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
        f"error: process {process} of {config.processes} {what} Start them all again: "
        f"{how_to_resume(config)}"
    )


def check_port(coordinator: str) -> None:
    """Raise a `UserError` if the coordinator cannot listen at its port."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"--coordinator {coordinator}: process 0 cannot listen there ({reason}); give all "
            f"processes another port."
        ) from None


def free_port() -> int:
    """Return a port where nothing listens."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
