"""Describe the running statistics of a layer in numbers and in findings."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxbn.health._command.layers import Layer
from jaxbn.health._finding import Finding
from jaxbn.health._running_statistics import (
    as_initialized,
    impossible_values,
    is_small,
    small_variances,
)


def find_faults(layer: Layer, epsilon: float) -> Iterator[Finding]:
    """Yield the findings of a layer, as far as its statistics alone show them."""
    yield from never_updated(layer)
    yield from impossible_values(layer.path, layer.mean, layer.var)
    yield from small_variances(layer.path, layer.var, epsilon)


def never_updated(layer: Layer) -> Iterator[Finding]:
    """Yield a finding if the statistics still have their initial values."""
    if not layer.mean.size or not as_initialized(layer.mean, layer.var):
        return
    found = "The running mean is 0 and the running variance is 1 in all features, as initialized"
    if layer.batches:
        text = (
            f"{found}, although {layer.names.batches} is {layer.batches}. Either the momentum "
            f"prevents any update (0 in PyTorch, 1 in Flax and jaxbn), or the statistics were "
            f"reset without their count. In evaluation, the layer does not normalize."
        )
    else:
        counted = "" if layer.batches is None else f", and {layer.names.batches} is 0"
        text = (
            f"{found}{counted}. Unless the checkpoint was saved before training, no training step "
            f"has updated them, and in evaluation the layer does not normalize. To update them, "
            f"{layer.names.how_to_update}."
        )
    yield Finding(layer.path, "never-updated", text)


def standardized_means(layer: Layer, epsilon: float) -> np.ndarray:
    """Return mean / sqrt(var + epsilon) of the features where it is a finite number, flat."""
    with np.errstate(all="ignore"):
        ratio = layer.mean / np.sqrt(layer.var + epsilon)
    return ratio[np.isfinite(ratio) & np.isfinite(layer.var)]


def describe(layer: Layer, epsilon: float) -> Mapping[str, Any]:
    """Return the numbers of a layer, as values that JSON can represent.

    Ranges are the [smallest, largest] finite values, or None if there are none.
    """
    finite = np.isfinite(layer.mean) & np.isfinite(layer.var)
    return {
        "path": layer.path,
        "shape": list(layer.mean.shape),
        "batches": layer.batches,
        "mean": _range(layer.mean),
        "var": _range(layer.var),
        "mean_in_deviations": _range(np.abs(standardized_means(layer, epsilon))),
        "not_finite": int(np.count_nonzero(~finite)),
        "negative": int(np.count_nonzero(layer.var < 0)),
        "below_epsilon": int(np.count_nonzero(is_small(layer.var, epsilon))),
    }


def _range(values: np.ndarray) -> list[float] | None:
    finite = values[np.isfinite(values)]
    return [float(finite.min()), float(finite.max())] if finite.size else None
