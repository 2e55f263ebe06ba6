"""`check` finds each planted fault, and nothing else."""

import numpy as np
import pytest

from tests.health import LAYERS, NETWORKS, codes, data, shuffled

# Other data: another mean and deviation in each feature.
OTHER = [2 * x[:, ::-1] - 3 for x in data()]
LOST = "Training lost the updates."


def recalibrated(make):
    return make().recalibrate(data())


def constant(value):
    return lambda leaf: np.full_like(leaf, value)


def with_first(value):
    return lambda leaf: np.concatenate([[np.float32(value)], leaf[1:]])


# How to make the network from its class, the batches, and the layers, the code and a part of the
# text of the findings.
FAULTS = {
    "lost updates": (lambda make: make(), data(), LAYERS, "never-updated", LOST),
    "one layer is forgotten": (
        lambda make: recalibrated(make).change("block/norm", mean=constant(0), var=constant(1)),
        data(),
        LAYERS[1:2],
        "never-updated",
        LOST,
    ),
    "momentum turned round": (
        lambda make: make(momentum=0.1).train(data()),
        data(),
        LAYERS[:1],
        "off",
        "They match the last batch alone",
    ),
    "a single batch": (
        lambda make: make(momentum=0.0).train(data()[:1]),
        data(),
        LAYERS[:1],
        "off",
        "They match batch 0 alone",
    ),
    "lag": (
        lambda make: make(momentum=0.99).train(shuffled()),
        shuffled(),
        LAYERS[:2],
        "off",
        "as after about 10 updates with momentum 0.99. Train longer",
    ),
    "another domain": (
        lambda make: make().recalibrate(OTHER),
        data(),
        # The other layers get normalized inputs, whatever the domain.
        LAYERS[:1],
        "off",
        "They come from other data",
    ),
    "NaN in the mean": (
        lambda make: recalibrated(make).change("exit", mean=with_first(np.nan)),
        data(),
        LAYERS[2:],
        "non-finite",
        "The running mean of 1 of 8 features (the first: 0) is not finite.",
    ),
    "infinity in the variance": (
        lambda make: recalibrated(make).change("entry", var=with_first(np.inf)),
        data(),
        LAYERS[:1],
        "non-finite",
        "The running variance of 1 of 8 features (the first: 0) is not finite.",
    ),
    "a negative variance": (
        lambda make: recalibrated(make).change("block/norm", var=with_first(-0.25)),
        data(),
        LAYERS[1:2],
        "negative-variance",
        "is negative, as low as -0.25.",
    ),
    "a dead feature": (
        lambda make: make().zero_feature(2).recalibrate(data()),
        data(),
        LAYERS[:1],
        "dead-features",
        "below epsilon (1e-05) in 1 of 8 features (the first: 2)",
    ),
    "few values": (
        recalibrated,
        [x[i : i + 8] for x in data() for i in range(0, 64, 8)],
        LAYERS,
        "few-values",
        "At most 8 values per feature are normalized together, so in training the mean scatters by "
        "0.35 standard deviations",
    ),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_no_other(fault, network):
    plant, batches, layers, code, text = FAULTS[fault]
    report = plant(NETWORKS[network]).check(batches)
    assert codes(report) == [(layer, code) for layer in layers]
    assert all(text in finding.text for finding in report.findings)
    assert not report.ok


@pytest.mark.parametrize("network", NETWORKS)
def test_recalibrated_statistics_are_healthy_and_exact(network):
    report = NETWORKS[network]().recalibrate(data()).check(data())
    assert report.ok
    for row in report.layers:
        # Statistics in float32, of values of order one.
        assert row.change < 1e-5 and row.mean < 1e-5 and abs(row.variance - 1) < 1e-5
    assert report.output_change < 1e-5
    assert [row.path for row in report.layers] == list(LAYERS)
    assert {row.values for row in report.layers} == {640}
