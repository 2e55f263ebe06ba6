"""The report of a history: tables, verdicts, and a file of the numbers."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import torch
from rich import box
from rich.table import Table

from train_examples.torch_twin.config import Config
from train_examples.torch_twin.lockstep import TRUTH, History, Name

Kind = Literal["parameters", "statistics"]
TITLES: dict[Kind, str] = {"parameters": "parameters", "statistics": "running statistics"}
STEPS = (1, 10, 50, 100, 200)
# Half of float64's precision is left for the growth of rounding during training.
FLOAT64_TOLERANCE = 1e-8


class Curves(NamedTuple):
    """The distances from one run after each step.

    Attributes:
      ours: the distances of the jaxbn run, (steps,).
      reordered: the distances of the reordered runs, (runs, steps).
    """

    ours: np.ndarray
    reordered: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """The distance of the jaxbn run over the median of the reordered runs."""
        return self.ours / np.median(self.reordered, axis=0)


def curves(history: History, kind: Kind, dtype: str, other: Name | None = None) -> Curves:
    """Return the distances of the runs of a dtype from PyTorch's of that dtype, or from `other`."""
    other = other or Name("PyTorch", dtype)

    def curve(run: Name) -> np.ndarray:
        return np.array([getattr(d, kind) for d in history.distances[run, other]])

    rows = [curve(run) for run in history.loss if run.dtype == dtype and "reordered" in run.which]
    return Curves(curve(Name("jaxbn", dtype)), np.array(rows))


def tables(history: History) -> Iterator[Table]:
    """Yield Markdown tables of the distances after some steps."""
    total = len(history.loss[TRUTH])
    steps = sorted({step for step in STEPS if step <= total} | {total})
    for kind, title in TITLES.items():
        double, single = (curves(history, kind, dtype) for dtype in ("float64", "float32"))
        rows = {
            "float64: jaxbn": double.ours,
            "float64: reordered": double.reordered,
            "float32: jaxbn": single.ours,
            "float32: reordered": single.reordered,
        }
        yield _table(f"Distance of {title} from PyTorch's run", steps, rows, single.ratio)
    error = curves(history, "parameters", "float32", TRUTH)
    theirs = history.distances[Name("PyTorch", "float32"), TRUTH]
    rows = {
        "jaxbn": error.ours,
        "PyTorch": np.array([d.parameters for d in theirs]),
        "PyTorch, reordered": error.reordered,
    }
    yield _table("Distance of float32's parameters from PyTorch's float64 run", steps, rows)


def _table(
    title: str, steps: list[int], rows: dict[str, np.ndarray], ratio: np.ndarray | None = None
) -> Table:
    result = Table("after step", title=title, title_justify="left", box=box.MARKDOWN)
    for step in steps:
        result.add_column(str(step), justify="right")
    for label, values in rows.items():
        result.add_row(label, *(_spread(values[..., step - 1]) for step in steps))
    if ratio is not None:
        label = "float32: jaxbn / median reordered"
        result.add_row(label, *(f"{ratio[step - 1]:.2g}" for step in steps))
    return result


def _spread(values: np.ndarray) -> str:
    """Return one value as text, or the smallest and the largest of several."""
    least, most = f"{values.min():.0e}", f"{values.max():.0e}"
    return least if least == most else f"{least} to {most}"


def float64_verdict(history: History) -> tuple[bool, str]:
    """Return whether the float64 runs agree after every step, and a sentence with the distance."""
    worst = max(curves(history, kind, "float64").ours.max() for kind in TITLES)
    within = bool(worst <= FLOAT64_TOLERANCE)
    steps = len(history.loss[TRUTH])
    return within, (
        f"float64: {worst:.1e} apart at most, in {steps} steps: "
        f"{'within' if within else 'NOT within'} {FLOAT64_TOLERANCE:.0e}"
    )


def float32_summary(history: History) -> str:
    """Return sentences that compare jaxbn's distance with those of the reordered runs."""
    found = curves(history, "parameters", "float32")
    ends, ratio = found.reordered[:, -1], found.ratio
    worst = int(ratio.argmax())
    return (
        f"float32: at the end jaxbn's parameters are {found.ours[-1]:.1e} from PyTorch's, those of "
        f"the reordered runs {ends.min():.1e} to {ends.max():.1e}\n"
        f"float32: the ratio to the reordered runs' median is {ratio[-1]:.2f} at the end, and "
        f"{ratio[worst]:.4g} where it is largest, after step {worst + 1}"
    )


def write_numbers(config: Config, history: History, file: Path) -> None:
    """Write all losses and distances, with the options and versions that gave them."""
    content = {
        "options": asdict(config) | {"out": str(config.out)},
        "versions": {"jax": jax.__version__, "torch": str(torch.__version__)},
        "loss": {str(run): values for run, values in history.loss.items()},
        "distances": [
            {"run": str(run), "from": str(other)}
            | {kind: [getattr(d, kind) for d in distances] for kind in TITLES}
            for (run, other), distances in history.distances.items()
        ],
    }
    file.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
