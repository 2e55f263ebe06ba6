"""Several processes on JAX's distributed runtime compute what one device computes."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import oracle
from tests.process_worker import DEVICES_EACH

ROOT = Path(__file__).parent.parent
PROCESSES = 2
FEATURES = 3

# Sums of some hundred numbers of order one, in another order: 1e-9 leaves float64 six digits.
TOLERANCE = 1e-9


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    shape = (16, 5, FEATURES)
    # The share of values that count grows from 0, for a whole device, to 1.
    mask = rng.random(shape) < np.repeat(np.linspace(0, 1, 4), 4)[:, None, None]
    return {
        "x": np.where(mask, 3 + 2 * rng.normal(size=shape), np.nan),
        "mask": mask,
        "dy": rng.normal(size=shape),
        **{k: rng.uniform(0.5, 2, size=FEATURES) for k in ("scale", "bias", "mean", "var")},
    }


@pytest.fixture(scope="module")
def results(problem, tmp_path_factory):
    """Return the results that each process saved."""
    folder = tmp_path_factory.mktemp("processes")
    np.savez(folder / "problem.npz", **problem)
    coordinator = f"127.0.0.1:{free_port()}"
    workers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.process_worker", coordinator, str(PROCESSES)),
                *(str(k), folder / "problem.npz", folder / f"{k}.npz"),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(PROCESSES)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=120)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    return [dict(np.load(folder / f"{k}.npz")) for k in range(PROCESSES)]


@pytest.mark.parametrize(
    "way", ["function shard_map", "function jit", "linen shard_map", "linen jit"]
)
def test_processes_equal_one_device(problem, results, way):
    p = problem
    truth = oracle.batch_norm(p["x"], p["dy"], p["scale"], p["bias"], mask=p["mask"])
    n = p["mask"].sum((0, 1))
    wanted = {
        "y": truth.y,
        "dx": truth.dx,
        "scale": truth.dscale,
        "bias": truth.dbias,
        "mean": 0.9 * p["mean"] + 0.1 * truth.mean,
        "var": 0.9 * p["var"] + 0.1 * truth.var * n / (n - 1),
    }
    for name in ("y", "dx"):
        rows = np.concatenate([result[f"{way} {name}"] for result in results])
        assert oracle.error(rows, wanted[name]) <= TOLERANCE, name
    for name in ("scale", "bias", "mean", "var"):
        each = np.concatenate([result[f"{way} {name}"] for result in results])
        assert each.shape == (PROCESSES * DEVICES_EACH, FEATURES)
        # Bit-identical on every device of every process.
        np.testing.assert_array_equal(each, each[:1].repeat(len(each), 0))
        assert oracle.error(each[0], wanted[name]) <= TOLERANCE, name
