"""Print the conventions of the installed frameworks' batch norms, and their rounding errors."""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxbn._picture_path import picture_path
from jaxbn.parity._command import picture, tables
from jaxbn.parity._command.frameworks import FRAMEWORKS, how_to_install
from jaxbn.parity._command.measurements import measure_frameworks, missing_frameworks


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jaxbn.parity", description=__doc__)
    others = [name for name in FRAMEWORKS if name != "ours"]
    parser.add_argument(
        "--frameworks",
        help="what to measure besides this library, separated by commas; by default, those that "
        f"are installed of {','.join(others)}",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16"],
        default="float32",
        help="the dtype of the hard inputs; conventions are always identified in float32",
    )
    parser.add_argument("--device", help="cpu, gpu or tpu; by default JAX's default device")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all numbers")
    form.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the errors")
    options = parser.parse_args(arguments)

    asked = options.frameworks is not None
    names = list(filter(None, map(str.strip, options.frameworks.split(",")))) if asked else others
    if unknown := sorted(set(names) - set(others)):
        parser.error(f"unknown frameworks {', '.join(unknown)}; there are {', '.join(others)}")
    terminal = not (options.json or options.markdown)
    for package, wanted in (("rich", terminal), ("matplotlib", options.png is not None)):
        if wanted and importlib.util.find_spec(package) is None:
            parser.error(
                f"{package} is missing: pip install 'jaxbn[parity]', or use --json or --markdown "
                "without --png"
            )
    device = options.device or jax.default_backend()
    try:
        jax.devices(device)
    except RuntimeError as error:
        parser.error(f"no device {device!r}: {error}")

    if asked and (missing := missing_frameworks(names, options.dtype, device)):
        reasons = "; ".join(f"{name} ({why})" for name, why in missing.items())
        advice = how_to_install(missing)
        parser.error(f"cannot measure {reasons}" + (f": {advice}" if advice else ""))

    if options.png is not None:
        try:
            options.png = picture_path(options.png)
        except ValueError as error:
            parser.error(f"argument --png: {error}")

    measured = measure_frameworks(["ours", *names], options.dtype, device)
    if options.json:
        print(json.dumps(measured, indent=2))
    elif options.markdown:
        print(tables.markdown(measured))
    else:
        tables.show(measured)
    if options.png is not None:
        picture.draw_picture(measured, options.png)


if __name__ == "__main__":
    main()
