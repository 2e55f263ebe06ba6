"""Find the reason why two networks differ, in the first batch norm that does."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxbn.parity._compare.layers import compare
from jaxbn.parity._compare.model_runs import Runs
from jaxbn.parity._compare.report import Row, last_place_of_one
from jaxbn.parity._networks.network import Network

# Each batch has this many of the values that arrived at the layer. More rows would hide the
# difference between the estimators of the variance.
_ROWS = 32
_STEPS = 2
# The largest relative error of a layer that counts as equal, in units of the last place of one.
# Networks are allowed more, since the errors of their layers add up.
_LAST_PLACES = 100


def diagnose_models(
    candidate: Network, reference: Network, runs: Runs, rows: Sequence[Row], rtol: float
) -> tuple[str, ...]:
    """Return why the first batch norm that differs does so, or nothing if none can be compared."""
    first = next((row for row in rows if not row.relative <= rtol), None)
    for name in _suspects(rows, rtol, runs):
        ours, theirs = candidate.batch_norm(name), reference.batch_norm(runs.names[name])
        inputs = runs.theirs["training"].norm_inputs.get(runs.names[name])
        if ours is None or theirs is None or inputs is None or len(inputs) < 2:
            continue
        own = runs.ours["training"].norm_inputs[name]
        if own.shape != inputs.shape or not np.all(np.isfinite(inputs)):
            continue
        tolerance = min(rtol, _LAST_PLACES * last_place_of_one(inputs.dtype))
        report = compare(ours, theirs, _batches(inputs), rtol=tolerance)
        reasons = report.diagnosis or ("no difference on the same input",)
        assert first is not None
        if first.stage.endswith("forward") and first.name != name:
            reasons = (f"{first.name} differs before it does", *reasons)
        return tuple(f"{name}: {reason}" for reason in reasons)
    return ()


def _suspects(rows: Sequence[Row], rtol: float, runs: Runs) -> Iterator[str]:
    """Yield the names of batch norms that differ, in the order of the computation."""
    norms = runs.ours["training"].norm_inputs
    before = None
    for row in rows:
        differs = not row.relative <= rtol
        name = row.name
        if row.stage == "running statistics":
            name = name.rpartition(" ")[0]
        if row.stage.endswith("backward"):
            # A gradient is wrong because of the layer after it, the last one that was right.
            name, was_right = before if before is not None else ("", False)
            differs &= was_right
            before = (row.name, row.relative <= rtol)
        if differs and name in norms:
            yield name


def _batches(inputs: np.ndarray) -> list[np.ndarray]:
    """Return batches of rows that are drawn at random, with a fixed seed, and have none in common.

    Two equal batches could not tell a cumulative average from a momentum.
    """
    dtype = inputs.dtype if inputs.dtype == np.float64 else np.dtype(np.float32)
    order = np.random.default_rng(0).permutation(len(inputs))
    # Each batch needs two rows, or it has no unbiased variance.
    parts = np.array_split(order, _STEPS) if len(order) >= 2 * _STEPS else [order] * _STEPS
    return [inputs[np.sort(part[:_ROWS])].astype(dtype) for part in parts]
