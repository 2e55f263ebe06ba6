"""Report what is wrong with the batch norms in a checkpoint, as far as it shows without data."""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxbn._picture_path import picture_path
from jaxbn.health._command import judge, picture, report
from jaxbn.health._command.errors import CheckpointError
from jaxbn.health._command.layers import find_layers, is_statistic, names_looked_for
from jaxbn.health._command.load import read
from jaxbn.health._command.names import printable

_MORE = """
Findings: never-updated (mean 0 and variance 1, as initialized), non-finite, negative-variance, and
dead-features (variance below epsilon).

Exit status: 0 if nothing is wrong, 1 if there are findings, 2 if the checkpoint cannot be read or
has no batch norms. Code in a checkpoint is never run.

--json prints an object with checkpoint, step, epsilon, layers, findings and skipped. Ranges are the
[smallest, largest] finite values, or null if there are none, so no number is NaN or infinite.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    options = _parse(arguments)
    try:
        checkpoint = read(options.checkpoint, is_statistic, options.step)
        layers, skipped = find_layers(checkpoint.arrays)
        if not layers:
            reasons = "".join(f"; skipped {text}" for text in skipped)
            names = names_looked_for()
            raise CheckpointError(
                f"{options.checkpoint} has no batch norms: no layer has {names}{reasons}"
            )
    except CheckpointError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2

    findings = [f for layer in layers for f in judge.find_faults(layer, options.epsilon)]
    found = {
        "checkpoint": str(options.checkpoint),
        "step": checkpoint.step,
        "epsilon": options.epsilon,
        "layers": [judge.describe(layer, options.epsilon) for layer in layers],
        "findings": [finding._asdict() for finding in findings],
        "skipped": skipped,
    }
    # Draw before printing, since the reader of a pipe may close it early.
    if options.png is not None:
        picture.draw_picture(
            layers,
            [report.faults(layer, found["findings"]) for layer in found["layers"]],
            options.png,
            title=report.heading(found),
            epsilon=options.epsilon,
        )
    if options.json:
        print(json.dumps(found, indent=2, allow_nan=False))
    else:
        report.show(found)
    return 1 if findings else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, after every check that needs no checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxbn.health",
        description=__doc__,
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="an Orbax directory, a .safetensors file, or a file that torch.save wrote",
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="the step to read, if the directory has several; the default is the last",
    )
    parser.add_argument(
        "--epsilon",
        type=_epsilon,
        default=1e-5,
        help="the epsilon that the layers add to the variance; the default is %(default)g",
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="also plot each layer's means, in deviations"
    )
    options = parser.parse_args(arguments)

    for package, wanted in (("rich", not options.json), ("matplotlib", options.png is not None)):
        if wanted and importlib.util.find_spec(package) is None:
            parser.error(
                f"{package} is missing: pip install 'jaxbn[health]', or use --json without --png"
            )
    if options.png is not None:
        try:
            options.png = picture_path(options.png)
        except ValueError as error:
            parser.error(f"argument --png: {error}")
    return options


def _epsilon(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def _report_unraisable(unraisable: Any) -> None:
    # Orbax reads in parallel. If a checkpoint is damaged, the first failure closes its event loop,
    # and the other reads report that as errors.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.unraisablehook = _report_unraisable
    # Use the CPU only, since a training run may need the memory of the accelerator.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
