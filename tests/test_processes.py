"""Several processes on JAX's distributed runtime compute what one device computes."""

import numpy as np
import pytest

from tests import oracle, processes
from tests.processes import DEVICES_EACH, PROCESSES

FEATURES = 3

# Sums of some hundred numbers of order one, in another order: 1e-9 leaves float64 six digits.
TOLERANCE = 1e-9


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
    return processes.run("tests.process_worker", folder, folder / "problem.npz")


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
