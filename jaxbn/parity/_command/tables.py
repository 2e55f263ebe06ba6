"""Show the measurements as tables, in the terminal or in Markdown."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxbn.parity._command.frameworks import how_to_install
from jaxbn.parity._command.measurements import INPUTS, KEYWORDS, RESULTS


class Table(NamedTuple):
    title: str
    head: list[str]
    rows: list[list[str]]


def tables(measured: Mapping[str, Any]) -> list[Table]:
    """Return a table of the conventions, and one of the errors for each result."""
    titles = list(measured["conventions"])
    shape = " x ".join(map(str, measured["shape"]))
    all_tables = [
        Table(
            "Conventions, in batch_norm's keywords",
            ["layer", *KEYWORDS, "note"],
            [[t, *keyword_values(c), c["note"] or ""] for t, c in measured["conventions"].items()],
        )
    ]
    for result in RESULTS:
        all_tables.append(
            Table(
                f"Largest error of {result} against extended precision, over the largest value, "
                f"{measured['dtype']}, {shape}",
                ["input", *titles],
                [[n, *[_error(measured["errors"][t], n, result) for t in titles]] for n in INPUTS],
            )
        )
    return all_tables


def keyword_values(convention: Mapping[str, Any]) -> list[str]:
    """Return the values of a convention's keywords as text, with "?" for unknown ones."""
    # A momentum may be None, so that `get` would not do.
    return [str(convention[name]) if name in convention else "?" for name in KEYWORDS]


def _error(errors: Mapping[str, Mapping[str, float | None]] | None, name: str, result: str) -> str:
    if errors is None:
        return "?"
    return "nan" if (error := errors[name][result]) is None else f"{error:.0e}" if error else "0"


def remarks(measured: Mapping[str, Any]) -> str:
    """Return what the measurements were made with, and what is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    lines = [f"On {measured['device']}: {versions}."]
    lines += [f"Left out: {name} ({why})." for name, why in measured["missing"].items()]
    if advice := how_to_install(measured["missing"]):
        lines.append(f"{advice}.")
    return "\n".join(lines)


def markdown(measured: Mapping[str, Any]) -> str:
    """Return the tables in Markdown."""
    text = []
    for table in tables(measured):
        lines = [table.head, ["---"] * len(table.head), *table.rows]
        text += [f"{table.title}:", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*text, remarks(measured).replace("\n", "\n\n")])


def show(measured: Mapping[str, Any]) -> None:
    """Print the tables, which fit into 80 columns. Needs Rich."""
    import rich.console

    console = rich.console.Console(highlight=False, markup=False)
    conventions, *errors = tables(measured)
    notes = [f"{row[0]}: {row[-1]}." for row in conventions.rows if row[-1]]
    rows = [row[:-1] for row in conventions.rows]
    console.print(_rich_table(Table(conventions.title, conventions.head[:-1], rows)))
    # Sentences would leave no width to the other columns.
    console.print(*notes, "", sep="\n")
    for table in errors:
        console.print(_rich_table(table))
    console.print(remarks(measured))


def _rich_table(table: Table) -> Any:
    import rich.box
    import rich.table

    shown = rich.table.Table(
        title=table.title,
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    first, *others = table.head
    shown.add_column(first)
    for name in others:
        # Only the first column is wrapped where the terminal is narrow.
        shown.add_column(name.replace(" ", "\n").replace(".", ".\n"), no_wrap=True)
    for row in table.rows:
        shown.add_row(*row)
    return shown
