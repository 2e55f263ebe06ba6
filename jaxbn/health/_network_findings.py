"""Find changes of the network's output that its layers do not explain."""

from collections.abc import Iterable, Sequence
from functools import reduce

from jaxbn.calibrate._statistics import Statistics, merge_statistics
from jaxbn.health._distance import LARGEST_HEALTHY, State, distance
from jaxbn.health._finding import Finding
from jaxbn.health._layer import CheckedLayer

# Findings about a layer that explain any change of the output.
_EXPLANATIONS = {"never-updated", "off", "non-finite", "negative-variance", "replicas-differ"}

# A larger change of the output, in standard deviations, is a finding whatever the layers explain.
_LARGEST_CHANGE = 1.0


def network_findings(
    layers: Sequence[CheckedLayer], change: float | None, findings: Iterable[Finding]
) -> list[Finding]:
    r"""Return a finding if the output changes more than the layers explain.

    Suppose one layer's output changes by `d` standard deviations. If the layers after it are linear
    and neither amplify nor attenuate the change, the network's output changes by at most `d`
    standard deviations, and the changes of several layers add up to at most their sum. Real
    networks may amplify a change, for example by averaging over an image, which shrinks the data
    but not the change. No bound holds for all networks, so a finding requires a change of more than
    0.5 beyond the sum. A change of more than 1 is a finding in any case: then the errors of many
    layers add up to as much as the output varies.

    If the calls of a layer have very different statistics, the layer's distance does not measure
    this. A finding then requires a change of more than 0.5.

    Args:
      layers: the layers.
      change: the relative change of the network's output, or None.
      findings: what is wrong with the layers.
    """
    if change is None or any(finding.code in _EXPLANATIONS for finding in findings):
        return []
    shared = [layer for layer in layers if _distance_of_calls(layer) > LARGEST_HEALTHY]
    explained = 0.0 if shared else sum(layer.distance for layer in layers if layer.exact)
    # A change that is NaN is a finding.
    if change <= min(LARGEST_HEALTHY + explained, _LARGEST_CHANGE):
        return []
    difference = (
        f"With running instead of exact statistics, the network's output changes by {change:.2g} "
        f"standard deviations (RMS), although no layer's statistics are far off. "
    )
    if shared:
        names = ", ".join(layer.path or "the model" for layer in shared)
        return [
            Finding(
                "",
                "eval-differs",
                f"{difference}Inputs with different statistics share a layer, and its running "
                f"statistics fit none of them: {names}. Training normalizes each call separately. "
                f"Use a separate layer for each call.",
            )
        ]
    return [
        Finding(
            "",
            "eval-differs",
            f"{difference}Small errors add up over the layers, or the network amplifies them. "
            f"Recalibrate (jaxbn.calibrate.recalibrate), or train with larger batches and a "
            f"momentum closer to 1.",
        )
    ]


def _distance_of_calls(layer: CheckedLayer) -> float:
    """Return the largest distance between the merged statistics and those of a single call."""
    if len(layer.calls) < 2:
        return 0.0
    epsilon = layer.facts.epsilon
    merged = _biased(reduce(merge_statistics, layer.calls))
    return max(distance(merged, _biased(call), epsilon) for call in layer.calls)


def _biased(statistics: Statistics) -> State:
    return State(statistics.mean, statistics.var)
