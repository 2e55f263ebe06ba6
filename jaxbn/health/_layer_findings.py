"""Find what is wrong with one layer."""

import math
from collections.abc import Iterator

import numpy as np

from jaxbn.health._alone import ClosestBatch
from jaxbn.health._distance import (
    LARGEST_HEALTHY,
    State,
    change,
    mean_difference,
    variance_ratio,
    worst_ratio,
)
from jaxbn.health._explain import cause
from jaxbn.health._finding import Finding
from jaxbn.health._layer import CheckedLayer
from jaxbn.health._running_statistics import as_initialized, feature, features, impossible_values

# The mean of fewer values scatters by more than a quarter of a standard deviation.
_FEWEST_VALUES = 16
# A change of this size is harmless for any number of values.
_HARMLESS = 0.1


def layer_findings(layer: CheckedLayer) -> Iterator[Finding]:
    """Yield the findings of a layer."""
    impossible = list(impossible_values(layer.path, *layer.running))
    yield from impossible
    if layer.exact is None or layer.closest is None:
        return
    if not impossible:
        yield from _difference(layer, layer.exact, layer.closest)
    yield from _dead_features(layer, layer.exact)
    yield from _few_values(layer, layer.closest)


def _difference(layer: CheckedLayer, exact: State, closest: ClosestBatch) -> Iterator[Finding]:
    if as_initialized(*layer.running):
        # The statistics of n values with mean 0, variance 1 and kurtosis k are at a distance of
        # about sqrt((1 + (k - 1) / 4) / n), which for k below 33 is less than this.
        noise = 3 / math.sqrt(max(layer.values, 1))
        if layer.distance > min(max(noise, _HARMLESS), LARGEST_HEALTHY):
            yield _never_updated(layer, exact)
        return
    if layer.distance > LARGEST_HEALTHY:
        states = layer.running, exact, layer.facts.epsilon
        means, ratios = np.abs(mean_difference(*states)), variance_ratio(*states)
        worst_mean, worst_variance = int(np.argmax(means)), worst_ratio(ratios)
        yield Finding(
            layer.path,
            "off",
            f"The running statistics change the normalized output by {layer.distance:.2g} "
            f"standard deviations (RMS). The running mean is up to "
            f"{means.flat[worst_mean]:.3g} standard deviations from the mean of the data (feature "
            f"{feature(means.shape, worst_mean)}), and the running variance is "
            f"{ratios.flat[worst_variance]:.3g} times that of the data (feature "
            f"{feature(means.shape, worst_variance)}). "
            f"{cause(layer.running, exact, layer.facts, closest)}",
        )


def _never_updated(layer: CheckedLayer, exact: State) -> Finding:
    changes = change(layer.running, exact, layer.facts.epsilon)
    worst = int(np.argmax(changes))
    return Finding(
        layer.path,
        "never-updated",
        f"The running statistics still have their initial values, mean 0 and variance 1, but the "
        f"data has mean {exact.mean.flat[worst]:.3g} and variance {exact.var.flat[worst]:.3g} "
        f"(feature {feature(changes.shape, worst)}). Training lost the updates. In Linen, call "
        f"`y, updates = model.apply(variables, x, ..., mutable=['batch_stats'])` and keep the "
        f"updates. In NNX, call `model.train()`, and return the state from functions that JAX "
        f"transforms. To find this in the first step, use jaxbn.health.assert_updated. To repair "
        f"this model, recalibrate it (jaxbn.calibrate.recalibrate).",
    )


def _dead_features(layer: CheckedLayer, exact: State) -> Iterator[Finding]:
    has_values = sum(np.asarray(call.n) for call in layer.calls) > 0
    dead = (exact.var < layer.facts.epsilon) & np.broadcast_to(has_values, exact.var.shape)
    if np.any(dead):
        yield Finding(
            layer.path,
            "dead-features",
            f"The data has a variance below epsilon ({layer.facts.epsilon:g}) in {features(dead)}. "
            f"Epsilon dominates the normalization of these features, so their output is almost "
            f"constant. Look for constant inputs or dead units before this layer, or scale the "
            f"inputs up.",
        )


def _few_values(layer: CheckedLayer, closest: ClosestBatch) -> Iterator[Finding]:
    group = layer.facts.group_values
    values = min(closest.values, group)
    # How many devices share the statistics is not known here.
    if values < _FEWEST_VALUES and not layer.facts.shares:
        larger = "a larger virtual_batch_size" if group < closest.values else "larger batches"
        yield Finding(
            layer.path,
            "few-values",
            f"At most {values} values per feature are normalized together, so in training the mean "
            f"scatters by {1 / math.sqrt(max(values, 1)):.2g} standard deviations, and evaluation "
            f"differs. Use {larger}, share statistics across devices (axis_name), or use batch "
            f"renormalization (jaxbn.linen.BatchRenorm, jaxbn.nnx.BatchRenorm).",
        )
