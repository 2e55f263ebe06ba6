"""`python -m benchmarks.redraw` reads what the benchmarks have written."""

from pathlib import Path

import pytest

from benchmarks import plots, redraw, report
from benchmarks.report_compiled import table

STORED = Path(__file__).parent.parent / "docs" / "performance"


def speed_of(contender, ratio, **fields):
    return {
        "pass": "forward_backward",
        "data": "far",
        "dtype": "bfloat16",
        "layout": "NCHW",
        "contender": contender,
        "ours_over_it": ratio,
        "of_floor": 0.5,
        **fields,
    }


def test_speed():
    case = {"shape": (8, 2), "seconds": 0.002, "rounds": 3}
    ratios = {"ours": 1.0, "Flax": 0.83, "PyTorch": 1.5}
    measured = {
        "data": {"far": "N(5, 1)"},
        "missing": {},
        "summary": [speed_of(name, ratio, shapes=1) for name, ratio in ratios.items()],
        "cases": [speed_of(name, 2 * ratio, **case) for name, ratio in ratios.items()],
    }
    read = redraw.read_speed(report.speed(measured))
    assert list(read["data"]) == ["far"]
    for part, factor in (("summary", 1), ("cases", 2)):
        keys = ("pass", "data", "dtype", "layout", "contender", "ours_over_it")
        assert read[part] == [
            {key: speed_of(name, factor * ratios[name])[key] for key in keys}
            for name in ("Flax", "PyTorch")
        ]


def test_memory():
    cases = [
        {"dtype": "float32", "layer": name, "kept_per_input_byte": kept, "step_temporary_bytes": b}
        for name, kept, b in (("ours", 1.0, 65e6), ("Flax", 2.0, 97e6))
    ]
    text = report.memory({"shape": (2, 3), "images": (4, 5), "cases": cases})
    assert redraw.read_memory(text)["cases"] == cases


def test_tables_stand_under_their_headings():
    text = f"# A\n\n{table(['x'], [['1']])}\n\n## B\n\nWords.\n\n{table(['y'], [['2'], ['3']])}\n"
    assert list(redraw.tables(text)) == [("A", [{"x": "1"}]), ("B", [{"y": "2"}, {"y": "3"}])]


@pytest.mark.parametrize("name", ["speed", "memory", "compiled"])
def test_the_stored_results_are_drawn(name, monkeypatch, tmp_path):
    """The pictures are as wide as GitHub shows them, at two dots for each of its own."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    if name == "compiled":
        data = redraw.read_compiled(STORED / name)
        assert list(data["targets"]) == ["gpu", "tpu"]
    else:
        read = {"speed": redraw.read_speed, "memory": redraw.read_memory}[name]
        data = read((STORED / name / "results.md").read_text())
    plots.PLOTS[name](data, tmp_path / "x.png")
    (figure,) = figures
    assert figure.get_figwidth() * plots.DPI == 2 * 740
