"""Observe the calls of one batch, and convert between their moments and statistics."""

from itertools import zip_longest
from typing import Any

import jax
import numpy as np

from jaxbn.calibrate._batches import join, split
from jaxbn.calibrate._observe import CallMoments, ObservableModel, PerCall
from jaxbn.calibrate._statistics import Statistics, in_64_bits


class BatchObserver:
    """A function that observes the calls of a batch, either all or only those in training mode.

    It takes the statistics to normalize with and a batch, and returns the statistics of the inputs
    of the batch's calls.
    """

    def __init__(self, model: ObservableModel, every_call: bool):
        self.model, self.every_call = model, every_call

        def run(variables, prescribed, arrays, constants):
            return model.observe(variables, prescribed, join(arrays, constants), every_call).calls

        self._compiled = jax.jit(run, static_argnums=3)

    def prescribed(self, known: PerCall[Statistics], batch: Any) -> PerCall[CallMoments]:
        """Return the moments to prescribe to the calls of a batch, given the known statistics.

        In every pass, exactly the calls of this batch get prescribed moments, so the model is
        compiled only once for each shape.
        """
        shapes = self._compiled.eval_shape(self.model.variables, {}, *split(batch))
        return {
            layer: tuple(
                _to_moments(statistics, shape)
                for statistics, shape in zip_longest(known.get(layer, ())[: len(calls)], calls)
            )
            for layer, calls in shapes.items()
        }

    def __call__(self, known: PerCall[Statistics], batch: Any) -> PerCall[Statistics]:
        prescribed = self.prescribed(known, batch)
        if not prescribed:
            return {}
        observed = self._compiled(self.model.variables, prescribed, *split(batch))
        return {layer: tuple(map(_from_moments, calls)) for layer, calls in observed.items()}


def _from_moments(observed: CallMoments) -> Statistics:
    n, high, low, var = map(in_64_bits, observed[:4])
    return Statistics(n, high + low, var, np.asarray(observed.ddof))


def _to_moments(statistics: Statistics | None, shape: Any) -> CallMoments:
    """Return moments to prescribe, their mean as an unevaluated sum of two floats.

    Without statistics, they are moments of no values.

    Args:
      statistics: the statistics of the call so far, or None.
      shape: shapes and dtypes of the result, a `CallMoments`.
    """
    if statistics is None:
        return CallMoments(*(np.zeros(field.shape, field.dtype) for field in shape))
    n, mean, var, ddof = statistics
    with np.errstate(over="ignore", invalid="ignore"):
        high = mean.astype(shape.mean_high.dtype)
        fields = n, high, mean - high, var, ddof
        return CallMoments(
            *(value.astype(field.dtype) for value, field in zip(fields, shape, strict=True))
        )
