"""Pass over batches until every batch norm normalizes with exact statistics."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import length_hint
from typing import Any

import jax
import numpy as np

from jaxbn.calibrate._observe import ObservableModel, PerCall
from jaxbn.calibrate._observe_batch import BatchObserver
from jaxbn.calibrate._progress import Report, ignore
from jaxbn.calibrate._statistics import Statistics, merge_statistics

# Statistics of a part of the data, and the function that gathers those of all parts.
Part = Sequence[PerCall[Statistics]]
Gather = Callable[[Callable[[], Part]], Sequence[Part]]


def repeatable(batches: Iterable[Any]) -> Iterable[Any]:
    """Return batches that can be iterated over several times, copying an iterator into a list."""
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches must be a list of batches, got a {type(batches).__name__}: put a single "
            f"batch into a list."
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def exhausted() -> ValueError:
    """Return the error for batches that are empty in the second pass."""
    return ValueError(
        "batches were exhausted by the first pass over them: give a list, or an iterable that "
        "starts again with each iter()."
    )


def of_this_process(step: Callable[[], Part]) -> list[Part]:
    """Return what `step` returns for the batches of this process, which are all of the data."""
    return [step()]


class NothingToObserve(ValueError):
    """The model calls no batch norm, or only frozen ones."""


def exact_statistics(
    model: ObservableModel,
    batches: Iterable[Any],
    gather: Gather = of_this_process,
    *,
    most_passes: int | None = None,
    report: Report = ignore,
) -> tuple[PerCall[Statistics], BatchObserver]:
    """Return the statistics of each call in one training step on all batches as one batch.

    Each call normalizes with its statistics over all batches. Each pass makes those of one more
    layer exact: its input depends on the statistics of the layers before it. In the first pass,
    each call normalizes with its statistics over the current batch. They differ from those of all
    batches, but for batches of n random values the differences average out over the batches, to
    first order, and what remains falls like 1 / n. Statistics over all batches so far would be
    closer in each batch, but the differences of the first batches would remain.

    Args:
      model: the model. If any of its layers runs in training mode, only such layers are observed.
      batches: `repeatable` batches. They are iterated over once for each pass.
      gather: takes a function, and returns what it returns in each process that has a part of the
        data. It is called once for each pass. Everything else depends only on what it returns, so
        that all processes do the same.
      most_passes: the number of passes after which to stop, although later layers are not exact.
      report: called after each batch.

    Returns:
      The statistics, and the function that observed them.
    """
    batches = _Restarting(batches)

    def passes(known: PerCall[Statistics]) -> int:
        """Return the number of passes, which is known once each layer has been called."""
        layers = sum(call.ddof.size for calls in known.values() for call in calls)
        return layers if most_passes is None else min(layers, most_passes)

    def report_first(known: PerCall[Statistics]) -> None:
        report(1, max(passes(known), 1), batches.read, batches.count)

    observe, known = _first_pass(model, batches, gather, report_first)
    number = 1

    def next_part() -> Part:
        merged: PerCall[Statistics] = {}
        for batch in batches:
            merged = _merge_calls(merged, observe(known, batch))
            report(number, passes(known), batches.read, batches.count)
        return (merged,)

    while number < passes(known):
        number += 1
        before, (known,) = known, _merge_parts(gather(next_part))
        if _equal(known, before):
            break
    return known, observe


class _Restarting:
    """Batches that are iterated over several times, and have to start again each time.

    Attributes:
      read: the number of batches that this iteration has yielded.
      count: the number of batches, or None while it is not known.
    """

    def __init__(self, batches: Iterable[Any]):
        self.batches, self.read = batches, 0
        self.count = length_hint(batches) or None

    def __iter__(self) -> Iterator[Any]:
        before, self.read = self.read, 0
        for batch in self.batches:
            self.read += 1
            yield batch
        if before and not self.read:
            raise exhausted()
        self.count = self.read


def _first_pass(
    model: ObservableModel,
    batches: _Restarting,
    gather: Gather,
    report: Callable[[PerCall[Statistics]], None],
) -> tuple[BatchObserver, PerCall[Statistics]]:
    """Observe the calls in training mode, or all calls if none is in training mode."""
    observe_training, observe_all = BatchObserver(model, False), BatchObserver(model, True)

    def first_part() -> Part:
        in_training: PerCall[Statistics] = {}
        in_all_modes: PerCall[Statistics] = {}
        for batch in batches:
            in_training = _merge_calls(in_training, observe_training({}, batch))
            if not in_training:
                in_all_modes = _merge_calls(in_all_modes, observe_all({}, batch))
            report(in_training or in_all_modes)
        return (in_training, in_all_modes) if batches.read else ()

    parts = [part for part in gather(first_part) if part]
    if not parts:
        raise ValueError("batches must hold at least one batch, got none.")
    in_training, in_all_modes = _merge_parts(parts)
    if not (in_training or in_all_modes):
        raise NothingToObserve(
            "model must call a batch norm of jaxbn.linen, flax.linen, jaxbn.nnx or flax.nnx that "
            "is not frozen, got a model that calls none."
        )
    return (observe_training, in_training) if in_training else (observe_all, in_all_modes)


def _merge_parts(parts: Sequence[Part]) -> list[PerCall[Statistics]]:
    return [reduce(_merge_calls, of_parts, {}) for of_parts in zip(*parts, strict=True)]


def _merge_calls(a: PerCall[Statistics], b: PerCall[Statistics]) -> PerCall[Statistics]:
    """Merge the statistics of each call. Either may have layers and calls that the other lacks."""

    def merge_layer(a: tuple[Statistics, ...], b: tuple[Statistics, ...]) -> Any:
        shared = tuple(map(merge_statistics, a, b))
        return shared + (a[len(shared) :] or b[len(shared) :])

    return {layer: merge_layer(a.get(layer, ()), b.get(layer, ())) for layer in {**a, **b}}


def _equal(a: PerCall[Statistics], b: PerCall[Statistics]) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))
