"""The report of a comparison: its text and its worst rows."""

from jaxbn.parity import Report
from jaxbn.parity._compare.report import Row


def rows(n, relative=lambda i: 1e-7 * i):
    """Return rows of two stages, with errors by their number."""
    stages = ("evaluation forward", "training forward")
    return tuple(Row(stages[i * 2 // n], f"layer{i}", relative(i), relative(i) * 1e7)
                 for i in range(n))  # fmt: skip


def test_the_worst_rows():
    found = rows(4, lambda i: float("inf") if i == 1 else i)
    report = Report(found, rtol=1e-5)
    assert report.worst(2) == (found[1], found[3])
    assert report.worst(9) == (found[1], found[3], found[2], found[0])
    assert report.worst(0) == ()


def test_a_long_report_without_differences_shows_the_largest_of_each_stage():
    assert str(Report(rows(80), rtol=1e-5, notes=("a note",))).splitlines() == [
        "No relative difference exceeds 1e-05.",
        "(a note)",
        "",
        "The largest error of each stage:",
        "                             relative  ulp",
        "evaluation forward  layer39   3.9e-06   39",
        "training forward    layer79   7.9e-06   79",
        "(78 rows omitted)",
    ]


def test_a_short_report_shows_all_rows():
    assert str(Report(rows(2), rtol=1e-5)).splitlines()[2:] == [
        "                            relative  ulp",
        "evaluation forward  layer0   0.0e+00    0",
        "training forward    layer1   1.0e-07    1",
    ]
