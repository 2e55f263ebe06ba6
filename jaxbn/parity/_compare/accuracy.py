"""Measure the rounding errors of two networks, each against its own results in float64."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from jaxbn.parity._compare.accuracy_report import AccuracyReport, AccuracyRow
from jaxbn.parity._compare.model_runs import Runs, checked_input, checked_names, run_both
from jaxbn.parity._compare.report import measure
from jaxbn.parity._networks.make import make_networks
from jaxbn.parity._networks.network import Network
from jaxbn.parity._networks.options import CallOptions


def compare_accuracy(
    candidate: Any,
    reference: Any,
    x: np.ndarray,
    names: Mapping[str, str] | None = None,
    *,
    evaluation: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    channels_first: Collection[int] = (4, 5),
) -> AccuracyReport:
    """Run two networks in float32 and in float64, and report which one rounds more, and where.

    `compare_models` in float32 shows by how much two networks differ, but not which of them is
    wrong. Here, the error of each is measured against its own results in float64, with the same
    parameters, statistics and input. The errors measure rounding only if the two networks agree in
    float64, and the report shows whether they do.

    JAX's 64-bit types are enabled for the runs in float64, so you need not enable them. A network
    in JAX must take its dtype from its input and parameters: one that is made with
    `dtype=jnp.float32` cannot run in float64.

    Args:
      candidate: see `compare_models`. A Keras model is rejected: its dtype is fixed.
      reference: see `compare_models`.
      x: the input in Flax's layout, a batch of images (N, H, W, C), floating.
      names: see `compare_models`.
      evaluation: see `compare_models`.
      training: see `compare_models`.
      channels_first: see `compare_models`.

    Returns:
      A report with one row per quantity, in the order of `compare_models`.

    Raises:
      ValueError: see `compare_models`; or a network returns float32 for an input in float64.
      TypeError: see `compare_models`; `x` is not floating; or a network cannot change its dtype.

    Example:
      >>> import flax.linen as nn, jax, numpy as np, torch
      >>> from jaxbn.parity import compare_accuracy
      >>> x = np.random.default_rng(0).normal(1000, 1, (64, 3)).astype(np.float32)
      >>> flax = nn.Sequential([nn.BatchNorm(use_running_average=False)])
      >>> variables = flax.init(jax.random.key(0), x)
      >>> theirs = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
      >>> report = compare_accuracy((flax, variables), theirs, x)
      >>> row = next(row for row in report.rows if row.stage == "training forward")
      >>> row.name, row.candidate_error > row.reference_error
      ('layers_0', True)
    """
    x = checked_input(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise TypeError(f"x must be floating, got {x.dtype}; integers are not rounded.")
    options = CallOptions(evaluation, training)
    networks = make_networks(candidate, reference, options, channels_first)
    x32 = x.astype(np.float32)
    with jax.enable_x64(False):
        ours, theirs = (network.astype("float32") for network in networks)
        names, notes = checked_names(ours, theirs, names, x32)
        rounded = run_both(ours, theirs, names, x32)
    with jax.enable_x64(True):
        ours, theirs = (network.astype("float64") for network in networks)
        exact = run_both(ours, theirs, names, x32.astype(np.float64))
    _require_float64(ours, exact.ours["training"].values)
    _require_float64(theirs, exact.theirs["training"].values)
    return AccuracyReport(_rows(rounded, exact), (*notes, *rounded.notes(ours, theirs)))


def _rows(rounded: Runs, exact: Runs) -> tuple[AccuracyRow, ...]:
    rows = []
    for short, long in zip(rounded.quantities(), exact.quantities(), strict=True):
        pairs = ((long.ours, long.theirs), (short.ours, long.ours), (short.theirs, long.theirs))
        errors = [measure("", "", *pair).relative for pair in pairs]
        rows.append(AccuracyRow(long.stage, long.name, *errors))
    return tuple(rows)


def _require_float64(network: Network, values: Mapping[str, np.ndarray]) -> None:
    for name, value in values.items():
        if value.dtype != np.float64:
            raise ValueError(
                f"{name} in {network.label} is {value.dtype} where parameters and input are "
                "float64; make the network without a dtype of its own."
            )
