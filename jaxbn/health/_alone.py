"""Find the batch whose own statistics are closest to the running statistics."""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from jaxbn.calibrate._observe_batch import BatchObserver
from jaxbn.calibrate._passes import exhausted
from jaxbn.calibrate._statistics import LayerPath, merge_statistics, to_state
from jaxbn.health._distance import State, distance


class ClosestBatch(NamedTuple):
    """The batch whose own statistics are closest to the running ones.

    Attributes:
      batch: its index among the batches.
      distance: the distance between its statistics and the running ones.
      is_last: whether it is the last batch with this layer.
      values: the number of values per feature in the largest call of any batch.
    """

    batch: int
    distance: float
    is_last: bool
    values: int


def closest_batches(
    observe: BatchObserver,
    batches: Iterable[Any],
    running: Mapping[LayerPath, State],
    epsilons: Mapping[LayerPath, float],
) -> dict[LayerPath, ClosestBatch]:
    """Return, for each layer, the batch whose statistics in a training step are closest.

    Every batch is normalized with its own statistics, in all layers.

    Args:
      observe: a function that observes a batch.
      batches: the batches.
      running: the running statistics of each layer.
      epsilons: the epsilon of each layer.
    """
    closest: dict[LayerPath, ClosestBatch] = {}
    for index, batch in enumerate(batches):
        for layer, calls in observe({}, batch).items():
            merged = reduce(merge_statistics, calls)
            state = State.of(*to_state(merged, *running[layer]))
            far = distance(running[layer], state, epsilons[layer])
            values = max(int(np.max(call.n, initial=0)) for call in calls)
            best = closest.get(layer, ClosestBatch(index, np.inf, True, 0))
            values = max(values, best.values)
            if far <= best.distance:
                closest[layer] = ClosestBatch(index, far, True, values)
            else:
                closest[layer] = best._replace(is_last=False, values=values)
    if not closest:
        raise exhausted()
    return closest
