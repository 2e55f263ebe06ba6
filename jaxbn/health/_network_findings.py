"""What is wrong with the output of the network, beyond its layers."""

from collections.abc import Iterable, Sequence
from functools import reduce

from jaxbn.calibrate._statistics import Statistics, merge_statistics
from jaxbn.health._distance import LARGEST_HEALTHY, State, distance
from jaxbn.health._finding import Finding
from jaxbn.health._layer import CheckedLayer

# Findings about a layer that explain any change of the output.
_EXPLANATIONS = {"never-updated", "off", "non-finite", "negative-variance", "replicas-differ"}


def network_findings(
    layers: Sequence[CheckedLayer], change: float | None, findings: Iterable[Finding]
) -> list[Finding]:
    r"""Return a finding if the output changes more than the layers explain.

    A change of `d` deviations of one layer's output, if the layers behind it are linear and neither
    amplify nor attenuate it, is a change of at most `d` deviations of the network's output, and the
    changes of several layers add up to at most their sum. Real networks may amplify a change, for
    example by averaging the data but not the change over an image, and no bound holds for all of
    them. So a finding needs a change of 0.5 beyond the sum.

    If a layer's calls have statistics that are far from each other, the layer's distance does not
    cover that, and a finding needs a change of 0.5 only.

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
    if change <= LARGEST_HEALTHY + explained:
        return []
    difference = (
        f"With running statistics, the output of the network differs by {change:.2g} of its "
        f"deviations from that with exact statistics, although those of each layer agree. "
    )
    if shared:
        names = ", ".join(layer.path or "the model" for layer in shared)
        return [
            Finding(
                "",
                "eval-differs",
                f"{difference}Inputs with different statistics share a layer, whose running "
                f"statistics fit none of them: {names}. Training normalizes each call by itself. "
                f"Give each call a layer of its own.",
            )
        ]
    return [
        Finding(
            "",
            "eval-differs",
            f"{difference}The network amplifies small changes. Recalibrate "
            f"(jaxbn.calibrate.recalibrate), or train with larger batches and a momentum closer to "
            f"1.",
        )
    ]


def _distance_of_calls(layer: CheckedLayer) -> float:
    """Return the largest distance of the merged statistics of the calls from those of a call."""
    if len(layer.calls) < 2:
        return 0.0
    epsilon = layer.facts.epsilon
    merged = _biased(reduce(merge_statistics, layer.calls))
    return max(distance(merged, _biased(call), epsilon) for call in layer.calls)


def _biased(statistics: Statistics) -> State:
    return State(statistics.mean, statistics.var)
