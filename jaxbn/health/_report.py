"""The result of a check: a row for each layer, and the findings."""

import math
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from jaxbn.health._finding import Finding

_WIDTH = 100
# More paths than this are counted instead of listed.
_MAX_PATHS = 8
# A larger change of the network's output is worth a remark even if nothing is wrong.
_SMALL_CHANGE = 0.2
_LEGEND = (
    "change: RMS change of the normalized output caused by the running statistics. mean: largest "
    "error of a running mean, in standard deviations. variance: running / exact, worst feature."
)
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|nan|inf"
# A number, or the index of a feature on several axes.
_NUMBERS = re.compile(rf"\((?:{_NUMBER})(?:, (?:{_NUMBER}))+\)|{_NUMBER}")


class LayerRow(NamedTuple):
    """A comparison of the running statistics of a layer with the exact statistics of the data.

    A frozen layer normalizes with its running statistics in training too. It is not compared, and
    its differences are NaN.

    Attributes:
      path: the path of the layer.
      values: the number of values per feature in the data; 0 for a frozen layer.
      change: the RMS change of the layer's normalized output if it normalizes with the running
        statistics instead of the exact ones.
      mean: the largest difference of the means over all features, in standard deviations of the
        data.
      variance: the running variance divided by the exact variance, for the feature where this ratio
        is farthest from 1.
    """

    path: str
    values: int
    change: float
    mean: float
    variance: float


@dataclass(frozen=True)
class Report:
    """The health of the batch norms of a model.

    Attributes:
      layers: a row for each layer, in the order in which the model calls them.
      output_change: the RMS difference between the network's outputs with running and with exact
        statistics, relative to the standard deviation of the outputs; None if the network has no
        floating output.
      findings: what is wrong, in the order of the layers.
    """

    layers: tuple[LayerRow, ...]
    output_change: float | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def raise_if_unhealthy(self) -> None:
        """Raise an `AssertionError` with the whole report if anything is wrong."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        lines = [*self._table(), *_wrapped(_LEGEND), ""]
        if self.output_change is not None and math.isfinite(self.output_change):
            lines += [
                f"The running statistics change the network's output by "
                f"{100 * self.output_change:.3g} % of its standard deviation (RMS)."
            ]
        if self.ok:
            return "\n".join([*lines, self._verdict_if_ok()])
        for alike in _alike(self.findings):
            lines += ["", *_paragraph(alike)]
        return "\n".join(lines)

    def _verdict_if_ok(self) -> str:
        if self.output_change is None or self.output_change <= _SMALL_CHANGE:
            return "The running statistics are healthy."
        return (
            "No faults were found. jaxbn.calibrate.recalibrate would remove this change of the "
            "output."
        )

    def _table(self) -> list[str]:
        codes: dict[str, list[str]] = {}
        for finding in self.findings:
            codes.setdefault(finding.path, []).append(finding.code)
        cells: list[tuple[str, ...]] = [
            ("layer", "values", "change", "mean", "variance", "findings")
        ]
        for path, values, *numbers in self.layers:
            found = dict.fromkeys(codes.get(path, []))
            formatted = ("-" if math.isnan(number) else f"{number:.2g}" for number in numbers)
            cells.append((_shown(path), str(values or "-"), *formatted, ", ".join(found)))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return [
            "  ".join(
                cell.ljust(width) if i in (0, 5) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in cells
        ]


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings of the same code whose texts differ only in numbers."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        words = _NUMBERS.sub("#", finding.text)
        groups.setdefault((finding.code, words), []).append(finding)
    return list(groups.values())


def _paragraph(alike: list[Finding]) -> list[str]:
    """Return the lines about the same fault in one or several layers."""
    first, paths = alike[0], [finding.path for finding in alike]
    where = ", ".join(map(_shown, paths[:_MAX_PATHS]))
    if len(paths) > _MAX_PATHS:
        where += f" and {len(paths) - _MAX_PATHS} more"
    example = f"{_shown(first.path)}: " if len(paths) > 1 else ""
    heading = f"{first.code}: {where}"
    return [*_wrapped(heading), *_wrapped(f"{example}{first.text}", "  ")]


def _shown(path: str) -> str:
    """Return the text that the report shows for a path, which is empty for the whole model."""
    return path or "(the model)"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=indent or "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
