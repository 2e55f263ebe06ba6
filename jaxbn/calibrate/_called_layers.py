"""Record the layers that a model calls, with their options."""

import math
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxbn import _call_checks
from jaxbn.calibrate._statistics import LayerPath


class LayerFacts(NamedTuple):
    """What is known about a layer that was called.

    Attributes:
      epsilon: the layer's epsilon.
      momentum: the layer's momentum, or None.
      frozen: whether it normalizes with its running statistics in training too.
      group_values: the number of values per feature, including masked-out ones, that are normalized
        together in the largest batch.
      shares: whether it shares statistics across devices (`axis_name`), however many.
    """

    epsilon: float
    momentum: float | None
    frozen: bool
    group_values: int
    shares: bool


class CalledLayers:
    """The layers that have been called so far, in the order of their first calls.

    Attributes:
      facts: the `LayerFacts` by path. Each trace of a model adds to them.
    """

    def __init__(self) -> None:
        self.facts: dict[LayerPath, LayerFacts] = {}

    def observing(self, every_call: bool) -> AbstractContextManager[None]:
        """Return a context in which `record` adds to these layers.

        Functions that were compiled outside the context, such as blocks in `nn.jit`, are traced
        again.
        """
        return _context((self, every_call))


# Its value is part of the keys of JAX's caches of traces, so that no cached trace is reused.
_context = jax.make_user_context(None)


def record(path: LayerPath, layer: Any, x: ArrayLike) -> None:
    """Record that a layer is called with `x`. Call it in a context of `CalledLayers.observing`."""
    called, _ = _context.value
    shape = np.shape(x)
    feature_axes = _call_checks.feature_axes(layer.axis, shape)
    sizes = [size for a, size in enumerate(shape) if a not in feature_axes]
    group = getattr(layer, "virtual_batch_size", None)
    if group is not None and sizes:
        sizes[0] = min(sizes[0], group)
    before = called.facts.get(path)
    called.facts[path] = LayerFacts(
        layer.epsilon,
        layer.momentum,
        bool(getattr(layer, "frozen", False)),
        max(math.prod(sizes), before.group_values if before else 0),
        layer.axis_name is not None,
    )
