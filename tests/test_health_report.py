"""The text and the layout of a report."""

import math

import pytest

from jaxbn.health import Finding, LayerRow, Report
from tests.health import LAYERS, NETWORKS, data
from tests.raises import raises

ROWS = (
    LayerRow("entry", 640, 1.25, 0.5, 0.015625),
    LayerRow("block/norm", 0, math.nan, math.nan, math.nan),
    LayerRow("exit", 1, 0, 0, 1),
)
LEGEND = """\
change: RMS change of the normalized output caused by the running statistics. mean: largest error of
  a running mean, in standard deviations. variance: running / exact, worst feature.
"""
TABLE = (
    """\
layer       values  change  mean  variance  findings
entry          640     1.2   0.5     0.016
block/norm       -       -     -         -
exit             1       0     0         1
"""
    + LEGEND
)


def test_a_healthy_report():
    report = Report(ROWS, 0.025, ())
    assert report.ok
    report.raise_if_unhealthy()
    assert str(report) == (
        f"{TABLE}\nThe running statistics change the network's output by 2.5 % of its standard "
        f"deviation (RMS).\nThe running statistics are healthy."
    )
    assert str(Report(ROWS, None, ())) == f"{TABLE}\nThe running statistics are healthy."


def test_findings_are_in_the_table_and_below_it():
    findings = (
        Finding("entry", "off", "It is off by 2 deviations."),
        Finding("entry", "few-values", "Too few."),
        Finding("exit", "off", "It is off by -1.5e-3 deviations."),
        Finding("", "eval-differs", "So it is."),
    )
    report = Report(ROWS, None, findings)
    assert not report.ok
    assert str(report).splitlines()[1:4] == [
        "entry          640     1.2   0.5     0.016  off, few-values",
        "block/norm       -       -     -         -",
        "exit             1       0     0         1  off",
    ]
    assert str(report).partition(LEGEND)[2] == (
        """

off: entry, exit
  entry: It is off by 2 deviations.

few-values: entry
  Too few.

eval-differs: (the model)
  So it is."""
    )
    with raises(AssertionError, str(report)):
        report.raise_if_unhealthy()


def test_texts_that_differ_in_more_than_numbers_are_all_given():
    texts = ["They lag (feature (1, 2)).", "They lag (feature 3).", "They are of other data."]
    report = Report(ROWS, None, tuple(Finding("exit", "off", text) for text in texts))
    text = str(report)
    assert [one in text for one in texts] == [True, False, True]


def test_many_layers_with_a_fault_share_a_paragraph():
    rows = tuple(LayerRow(f"layer{i}", 9, 0, 0, 1) for i in range(50))
    findings = tuple(Finding(row.path, "off", f"Off by {i}.") for i, row in enumerate(rows))
    text = str(Report(rows, None, findings))
    assert text.partition(LEGEND)[2] == (
        """

off: layer0, layer1, layer2, layer3, layer4, layer5, layer6, layer7 and 42 more
  layer0: Off by 0."""
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_a_report_of_a_network(network):
    report = NETWORKS[network]().check(data())
    text = str(report)
    assert max(map(len, text.splitlines())) <= 100
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["layer", *LAYERS]
    assert all(line.endswith("never-updated") for line in lines[1:4])
    assert text.count("Training lost the updates.") == 1
