"""Run a module in several processes of JAX's distributed runtime."""

import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
PROCESSES = 2
DEVICES_EACH = 2


def run(module, folder, *arguments):
    """Return what the processes saved, a dict of arrays for each.

    Each process runs `python -m module COORDINATOR PROCESS *arguments OUT`, and saves to OUT.
    """
    coordinator = f"127.0.0.1:{_free_port()}"
    outs = [folder / f"{k}.npz" for k in range(PROCESSES)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, coordinator, str(k), *arguments, out],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k, out in enumerate(outs)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=240)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    return [dict(np.load(out)) for out in outs]


def join(coordinator, process):
    """Join the other processes, and return a mesh of the devices of all."""
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, PROCESSES, process, initialization_timeout=60)
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
