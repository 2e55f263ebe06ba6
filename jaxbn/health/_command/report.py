"""Show the numbers of the layers and the findings in the terminal."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

# At most this many layers with the same fault are named.
_NAMED = 4


def show(report: Mapping[str, Any]) -> None:
    """Print the table and the findings in the width of the terminal. Needs Rich."""
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    console.print(heading(report))
    layers = report["layers"]
    prefix = _common_prefix([layer["path"] for layer in layers])
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(f"layer in {prefix}" if prefix else "layer", overflow="fold")
    for name in ("shape", "mean", "variance", "|mean|/std"):
        table.add_column(name, justify="right", no_wrap=True)
    cells = [faults(layer, report["findings"]) for layer in layers]
    if any(cells):
        table.add_column("found", no_wrap=True)
    for layer, found in zip(layers, cells, strict=True):
        largest = layer["mean_in_deviations"]
        row = [
            layer["path"].removeprefix(prefix),
            "x".join(map(str, layer["shape"])),
            _range(layer["mean"]),
            _range(layer["var"]),
            "-" if largest is None else _number(largest[1]),
        ]
        table.add_row(*row, *([found] if any(cells) else []), style="bold" if found else None)
    console.print(table)
    for paragraph in remarks(report):
        console.print(paragraph)
        console.print()


def heading(report: Mapping[str, Any]) -> str:
    """Return the number of batch norms and the checkpoint as a heading."""
    n = len(report["layers"])
    step = "" if report["step"] is None else f", step {report['step']}"
    return f"{n} batch norm{'s' * (n != 1)} in {report['checkpoint']}{step}"


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Return a paragraph for each kind of finding, and notes on counts and skipped layers."""
    by_code: dict[str, list[Mapping[str, str]]] = {}
    for finding in report["findings"]:
        by_code.setdefault(finding["code"], []).append(finding)
    paragraphs = []
    for code, findings in by_code.items():
        first, paths = findings[0], list(dict.fromkeys(f["path"] for f in findings))
        # If the texts differ, show that of the first layer; the table has the other numbers.
        of = f"In {first['path']}: " if any(f["text"] != first["text"] for f in findings) else ""
        paragraphs.append(f"{code}: {_listed(paths, len(report['layers']))}\n{of}{first['text']}")
    batches = [layer["batches"] for layer in report["layers"] if layer["batches"] is not None]
    if batches:
        least, largest = min(batches), max(batches)
        counted = f"{least}" if least == largest else f"{least} to {largest}"
        paragraphs.append(f"Batches counted: {counted}.")
    paragraphs += [f"Skipped {text}." for text in report["skipped"]]
    if not by_code:
        paragraphs.append(
            "The statistics show no faults. To compare them with data, use jaxbn.health.check."
        )
    return paragraphs


def _listed(paths: Sequence[str], n_layers: int) -> str:
    if len(paths) == n_layers:
        return "every layer"
    named = ", ".join(paths[:_NAMED])
    rest = len(paths) - _NAMED
    return f"{named} and {rest} more" if rest > 0 else named


def faults(layer: Mapping[str, Any], findings: Sequence[Mapping[str, str]]) -> str:
    """Return the faults of a layer in a few words, with the number of features."""
    codes = {finding["code"] for finding in findings if finding["path"] == layer["path"]}
    words = {
        "never-updated": "never updated",
        "non-finite": f"{layer['not_finite']} not finite",
        "negative-variance": f"{layer['negative']} negative",
        "dead-features": f"{layer['below_epsilon']} dead",
    }
    return ", ".join(text for code, text in words.items() if code in codes)


def _range(values: Sequence[float] | None) -> str:
    if values is None:
        return "-"
    least, largest = map(_number, values)
    return least if least == largest else f"{least}..{largest}"


def _number(value: float) -> str:
    """Return a number with two digits, and an exponent if it is very small or large."""
    return (
        f"{value:.1e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{float(f'{value:.2g}'):g}"
    )


def _common_prefix(paths: Sequence[str]) -> str:
    """Return the common prefix of several paths, up to a separator."""
    if len(paths) < 2:
        return ""
    prefix = ""
    for steps in zip(*(re.split("(?<=[./])", path) for path in paths), strict=False):
        if len(set(steps)) > 1:
            break
        prefix += steps[0]
    return prefix
