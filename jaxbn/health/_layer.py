"""A layer with its running statistics and the exact statistics of the data."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._patterns import as_text
from jaxbn.calibrate._called_layers import LayerFacts
from jaxbn.calibrate._observe import ObservableModel, PerCall
from jaxbn.calibrate._observe_batch import BatchObserver
from jaxbn.calibrate._replace import replaced
from jaxbn.calibrate._statistics import LayerPath, Statistics, leaf_indices
from jaxbn.health._alone import ClosestBatch, closest_batches
from jaxbn.health._distance import State, distance, mean_difference, variance_ratio, worst_ratio
from jaxbn.health._report import LayerRow

# With this many values, the two estimators of the variance are equal.
_MANY = 2.0**60


class CheckedLayer(NamedTuple):
    """A layer that the batches call.

    Attributes:
      path: its path.
      facts: its options.
      running: its running statistics.
      exact: those of the data, or None if it normalizes with its running statistics in training.
      calls: the exact statistics of each of its calls.
      closest: the batch whose own statistics are closest to the running ones, or None if `exact`
        is None.
    """

    path: str
    facts: LayerFacts
    running: State
    exact: State | None
    calls: tuple[Statistics, ...]
    closest: ClosestBatch | None

    @property
    def distance(self) -> float:
        """The distance between the running and the exact statistics."""
        if self.exact is None:
            return math.nan
        return distance(self.running, self.exact, self.facts.epsilon)

    @property
    def values(self) -> int:
        """The number of values per feature, in all calls together."""
        return int(sum(np.max(call.n, initial=0) for call in self.calls))

    @property
    def row(self) -> LayerRow:
        """The layer's row of the report."""
        if self.exact is None:
            return LayerRow(self.path, 0, math.nan, math.nan, math.nan)
        states = self.running, self.exact, self.facts.epsilon
        ratios = variance_ratio(*states)
        return LayerRow(
            self.path,
            self.values,
            self.distance,
            float(np.max(np.abs(mean_difference(*states)))),
            float(ratios.flat[worst_ratio(ratios)]),
        )

    @property
    def prescribed(self) -> tuple[Statistics, ...]:
        """The running statistics, in the form that prescribes them to each call."""
        mean, var = self.running
        return tuple(
            Statistics(
                np.full(call.n.shape, _MANY),
                mean.reshape(call.n.shape),
                var.reshape(call.n.shape),
                call.ddof,
            )
            for call in self.calls
        )


def checked_layers(
    model: ObservableModel,
    calls: PerCall[Statistics],
    observe: BatchObserver,
    batches: Iterable[Any],
) -> dict[LayerPath, CheckedLayer]:
    """Return the layers by path, in the order in which the model first calls them.

    Args:
      model: the model, which has been run on the batches.
      calls: the exact statistics of each call.
      observe: the function that observed them.
      batches: the batches.
    """
    facts = model.called.facts
    exact = states(replaced(model.statistics, calls))
    running = states(model.statistics)
    epsilons = {layer: facts[layer].epsilon for layer in calls}
    closest = closest_batches(observe, batches, running, epsilons)
    layers = layers_in_evaluation(model, calls) | {
        layer: CheckedLayer(
            as_text(layer),
            facts[layer],
            running[layer],
            exact[layer],
            of_layer,
            closest[layer],
        )
        for layer, of_layer in calls.items()
    }
    return {layer: layers[layer] for layer in facts if layer in layers}


def layers_in_evaluation(
    model: ObservableModel, calls: PerCall[Statistics]
) -> dict[LayerPath, CheckedLayer]:
    """Return the layers that normalize with their running statistics while others train."""
    return {
        layer: CheckedLayer(as_text(layer), model.called.facts[layer], running, None, (), None)
        for layer, running in states(model.statistics).items()
        if layer in model.called.facts and layer not in calls
    }


def states(statistics: Any) -> dict[LayerPath, State]:
    """Return the mean and the variance of each layer in a tree."""
    leaves = jax.tree.leaves(statistics)
    return {
        layer: State.of(*(leaves[indices[name]] for name in ("mean", "var")))
        for layer, indices in leaf_indices(statistics).items()
        if {"mean", "var"} <= indices.keys()
    }
