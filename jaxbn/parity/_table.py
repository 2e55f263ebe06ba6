"""What the command found, as tables for the terminal and for Markdown, and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbn.parity._survey import INPUTS, KEYWORDS, RESULTS

_EXACT, _NOT_A_NUMBER = 1e-9, 1e7


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]


def tables(found: Mapping[str, Any]) -> list[Table]:
    """One of the conventions, and one of the errors for each result."""
    titles = list(found["conventions"])
    shape = " x ".join(map(str, found["shape"]))
    all_tables = [
        Table(
            "Conventions, in batch_norm's keywords",
            ["layer", *KEYWORDS, "note"],
            [
                [t, *[_keyword(c, name) for name in KEYWORDS], c["note"] or ""]
                for t, c in found["conventions"].items()
            ],
        )
    ]
    for result in RESULTS:
        all_tables.append(
            Table(
                f"Largest error of {result} against extended precision, over the largest value, "
                f"{found['dtype']}, {shape}",
                ["input", *titles],
                [[n, *[_error(found["errors"][t], n, result) for t in titles]] for n in INPUTS],
            )
        )
    return all_tables


def _keyword(convention: Mapping[str, Any], name: str) -> str:
    # None is a momentum; what was not found is something else.
    return str(convention[name]) if name in convention else "?"


def _error(errors: Mapping[str, Mapping[str, float | None]] | None, name: str, result: str) -> str:
    if errors is None:
        return "?"
    return "nan" if (error := errors[name][result]) is None else f"{error:.0e}" if error else "0"


def remarks(found: Mapping[str, Any]) -> str:
    """What the numbers were taken on, and what is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"On {found['device']}: {versions}."]
    lines += [f"Left out: {name} ({why})." for name, why in found["missing"].items()]
    return "\n".join(lines)


def markdown(found: Mapping[str, Any]) -> str:
    text = []
    for table in tables(found):
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        text += [f"{table.title}:", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*text, remarks(found).replace("\n", "\n\n")])


def show(found: Mapping[str, Any]) -> None:
    """Prints the tables in the terminal's width. Needs Rich."""
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console(highlight=False, markup=False)
    for table in tables(found):
        shown = rich.table.Table(title=table.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
        for name in table.head:
            shown.add_column(name)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(remarks(found))


def picture_path(path: Path) -> Path:
    """Return where `picture` will write, or raise if it cannot. Needs Matplotlib.

    Raises:
      ValueError: Matplotlib does not write the format of the ending, or the file is not writable.
    """
    from matplotlib.figure import Figure

    path = path if path.suffix else path.with_name(f"{path.name}.png")
    endings = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in endings:
        raise ValueError(
            f"{path} ends in {path.suffix}, which Matplotlib cannot write; it writes "
            f"{', '.join(endings)}"
        )
    is_new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from error
    if is_new:
        path.unlink()
    return path


def picture(found: Mapping[str, Any], path: Path) -> None:
    """The errors, a panel for each result and a colour for each layer. Needs Matplotlib."""
    from matplotlib.figure import Figure

    measured = {t: errors for t, errors in found["errors"].items() if errors is not None}
    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, len(RESULTS), sharey=True)
    for at, result in zip(axes, RESULTS, strict=True):
        for k, (title, by_input) in enumerate(measured.items()):
            errors = [by_input[name][result] for name in INPUTS]
            # Both ends of the logarithmic axis: what is exact, and what is not a number.
            places = [_NOT_A_NUMBER if e is None else max(e, _EXACT) for e in errors]
            shift = (k - (len(measured) - 1) / 2) * 0.1
            convention = found["conventions"][title]
            keywords = [_keyword(convention, name) for name in KEYWORDS]
            label = f"{title}: {', '.join(keywords)}"
            at.plot(places, np.arange(len(INPUTS)) + shift, "o", ms=4, label=label)
        at.set(xscale="log", title=result, xlabel="largest error")
        ticks = {_EXACT: "exact", 1e-6: "1e-6", 1e-3: "1e-3", 1: "1", _NOT_A_NUMBER: "nan"}
        at.set_xticks(list(ticks), list(ticks.values()))
        at.minorticks_off()
        at.set_yticks(range(len(INPUTS)), INPUTS)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
