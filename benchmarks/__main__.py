"""Measure this project's batch norm against others, on the backend that JAX runs on.

Prints the tables, and writes results.json, results.md and a picture for each of speed, memory and
accuracy. Each section can be run alone: --only speed, or --only memory,accuracy.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The C library reads these as the process starts, and PyTorch's OpenMP as it is loaded. Without the
# first three, large blocks go back to the system after each call, and the next call pays for fresh
# pages; without the fourth, so do blocks over 64 MB that XLA's threads ask for, though not those of
# PyTorch, which asks in the main thread. Without the last, PyTorch's idle threads spin into the
# next contender's turn.
QUIET = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "1000000000",
    "MALLOC_ARENA_MAX": "1",
    "OMP_WAIT_POLICY": "passive",
}


def run_quietly() -> None:
    """Restart this command if variables that a process reads at its start are not set."""
    missing = {name: value for name, value in QUIET.items() if name not in os.environ}
    if sys.platform != "linux" or not missing:
        return
    print("starting again with:", " ".join(f"{k}={v}" for k, v in missing.items()), flush=True)
    argv = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
    os.execve(sys.executable, argv, {**os.environ, **missing})


def sections() -> dict[str, Callable[[Any], dict[str, Any]]]:
    from benchmarks import (
        accuracy,
        collectives,
        compiled,
        forms,
        memory,
        recompute,
        speed,
        training_step,
    )

    return {
        "speed": speed.measure,
        "memory": memory.measure,
        "accuracy": accuracy.measure,
        "training_step": training_step.measure,
        "recompute": recompute.measure,
        "forms": forms.measure,
        "collectives": collectives.measure,
        "compiled": compiled.measure,
    }


def main(argv: Sequence[str]) -> None:
    from benchmarks.settings import Settings
    from benchmarks.speed import DATA, data_names

    measures = sections()

    def names(text: str) -> list[str]:
        found = text.replace("-", "_").split(",")
        if unknown := set(found) - set(measures):
            raise argparse.ArgumentTypeError(
                f"{', '.join(sorted(unknown))}: the sections are {', '.join(measures)}"
            )
        return found

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small shapes: under a minute")
    parser.add_argument(
        "--only", type=names, action="extend", help="sections, by commas; may be repeated"
    )
    parser.add_argument(
        "--data",
        type=data_names,
        default=Settings().data,
        help=f"the data of speed, by commas: {', '.join(DATA)}",
    )
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder to write")
    args = parser.parse_args(argv)

    import matplotlib
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks import plots, report

    matplotlib.use("Agg")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"environment": report.environment(), "sections": {}}
    columns = (
        TextColumn("{task.description}"),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        settings = Settings(
            args.quick,
            args.data,
            lambda things, name: progress.track(things, description=name),
            args.out,
        )
        for name, measure in measures.items():
            if not args.only or name in args.only:
                results["sections"][name] = measure(settings)

    # Written first, so that an error in the report loses no measurement.
    results_json = args.out / "results.json"
    results_json.write_text(json.dumps(results, indent=1) + "\n")
    markdown = report.markdown(results, shlex.join(["python", "-m", "benchmarks", *argv]))
    (args.out / "results.md").write_text(markdown)
    written = [results_json, args.out / "results.md"]
    for name, plot in plots.PLOTS.items():
        if name in results["sections"]:
            written.append(args.out / f"{name}.png")
            plot(results["sections"][name], written[-1])
    print(markdown)
    print("wrote", *written)


if __name__ == "__main__":
    run_quietly()
    main(sys.argv[1:])
