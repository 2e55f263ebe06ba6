"""Draw the pictures of docs/performance again from the results beside them, without measuring.

Results are read as they are stored: tables of speed and memory in results.md, counts of compiled
programs in compiled-gpu.json and compiled-tpu.json.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks import plots
from benchmarks.report import PASSES
from benchmarks.targets import TARGETS

Row = dict[str, str]


def tables(text: str) -> Iterator[tuple[str, list[Row]]]:
    """Yield each table of a Markdown page under its heading, with a dict for each row."""
    for heading, block in re.findall(
        r"^#+ (.+?)\n\n(?:[^|#\n].*\n+)*((?:\|.*\n)+)", text + "\n", re.M
    ):
        head, _, *rows = ([c.strip() for c in line[1:-1].split("|")] for line in block.splitlines())
        yield heading, [dict(zip(head, row, strict=True)) for row in rows]


def read_speed(text: str) -> dict[str, Any]:
    """Return what `benchmarks.plots.speed` draws, from the page that the benchmark wrote."""
    kinds = {title: kind for kind, title in PASSES.items()}
    cases, summary = [], []
    for heading, rows in tables(text):
        kind = kinds.get(heading.removeprefix("Each shape: "))
        for row in rows:
            found = summary if kind is None else cases
            given = {
                "pass": kind or kinds[row["pass"]],
                "data": row["data"],
                "dtype": row["type"],
                "layout": row["layout"],
            }
            found += [
                {**given, "contender": column.removeprefix("ours / "), "ours_over_it": float(cell)}
                for column, cell in row.items()
                if column.startswith("ours / ")
            ]
    return {
        "data": dict.fromkeys(one["data"] for one in summary),
        "cases": cases,
        "summary": summary,
    }


def read_memory(text: str) -> dict[str, Any]:
    """Return what `benchmarks.plots.memory` draws, from the page that the benchmark wrote."""
    rows = dict(tables(text))["Memory"]
    return {
        "cases": [
            {
                "dtype": row["type"],
                "layer": row["layer"],
                "kept_per_input_byte": float(row["bytes kept per input byte"]),
                "step_temporary_bytes": 1e6 * float(row["temporaries of the step"].split()[0]),
            }
            for row in rows
        ]
    }


def read_compiled(folder: Path) -> dict[str, Any]:
    """Return what `benchmarks.plots.compiled` draws, from the files of the targets."""
    paths = {target: folder / f"compiled-{target}.json" for target in TARGETS}
    return {"targets": {t: json.loads(p.read_text()) for t, p in paths.items() if p.exists()}}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.redraw", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/performance"))
    folder = parser.parse_args().folder
    matplotlib.use("Agg")
    plots.compiled(read_compiled(folder / "compiled"), folder / "compiled" / "compiled.png")
    for name, read in (("speed", read_speed), ("memory", read_memory)):
        text = (folder / name / "results.md").read_text()
        plots.PLOTS[name](read(text), folder / name / f"{name}.png")


if __name__ == "__main__":
    main()
