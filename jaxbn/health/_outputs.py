"""Measure how much the running statistics change the output of a network."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._moments import statistics_dtype
from jaxbn.calibrate._batches import join, split
from jaxbn.calibrate._observe import PerCall
from jaxbn.calibrate._observe_batch import BatchObserver
from jaxbn.calibrate._statistics import Statistics, merge_statistics


def output_change(
    observe: BatchObserver,
    batches: Iterable[Any],
    running: PerCall[Statistics],
    exact: PerCall[Statistics],
) -> float | None:
    """Return the RMS change of the output, relative to the output's standard deviation.

    The output is computed with the running statistics, and with the exact statistics of each call.
    If it has several arrays, such as those of several heads, the largest change is returned. If it
    has no floating array, None is returned. The standard deviation is over all values of an array;
    a single value for each batch, such as a loss, is compared with its magnitude.

    Args:
      observe: a function that observes a batch.
      batches: the batches.
      running: the running statistics, for each call.
      exact: the exact statistics of each call.
    """

    def run(variables, running, exact, arrays, constants):
        batch = join(arrays, constants)
        outputs = (
            _floating_leaves(observe.model.observe(variables, used, batch, observe.every_call))
            for used in (running, exact)
        )
        of_running, of_exact = outputs
        return {path: _summary(of_running[path], of_exact[path]) for path in of_exact}

    compiled = jax.jit(run, static_argnums=4)
    totals: dict[str, _Output] = {}
    n_batches = 0
    for batch in batches:
        n_batches += 1
        prescribed = (observe.prescribed(used, batch) for used in (running, exact))
        outputs = compiled(observe.model.variables, *prescribed, *split(batch))
        for path, of_batch in outputs.items():
            output = _output(*np.asarray(of_batch, np.float64))
            totals[path] = _merge(totals[path], output) if path in totals else output
    return max((_relative(output, n_batches) for output in totals.values()), default=None)


class _Output(NamedTuple):
    """The count, mean and variance of the values of an output, and their mean square change."""

    values: Statistics
    change: np.ndarray


def _output(n: np.ndarray, mean: np.ndarray, var: np.ndarray, change: np.ndarray) -> _Output:
    return _Output(Statistics(n, mean, var, np.asarray(0)), change)


def _merge(a: _Output, b: _Output) -> _Output:
    values = merge_statistics(a.values, b.values)
    total = a.change * a.values.n + b.change * b.values.n
    return _Output(values, total / np.maximum(values.n, 1))


def _floating_leaves(observation: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(observation.output)
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in leaves
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size > 0
    }


def _summary(of_running: jax.Array, of_exact: jax.Array) -> jax.Array:
    """Return the count, mean and variance of the output, and its mean square change.

    Entries that are infinite or NaN with exact statistics, such as masked-out logits, are ignored.
    """
    dtype = statistics_dtype(of_exact.dtype)
    y, changed = of_exact.astype(dtype), of_running.astype(dtype)
    finite = jnp.isfinite(y)
    n = jnp.sum(finite, dtype=dtype)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(finite, values, 0)) / jnp.maximum(n, 1)

    return jnp.stack([n, mean(y), mean((y - mean(y)) ** 2), mean((changed - y) ** 2)])


def _relative(output: _Output, n_batches: int) -> float:
    (n, mean, variance, _), change = output
    if change == 0:
        return 0.0
    # The variance between the batches' means, such as losses, says little about their size. A
    # smaller variance than the last is only the rounding error of the mean in float32.
    if n <= n_batches:
        scale = max(variance, mean**2)
    else:
        scale = variance if variance > 1e-12 * mean**2 else mean**2
    return float(np.sqrt(change / scale)) if scale > 0 else float("inf")
