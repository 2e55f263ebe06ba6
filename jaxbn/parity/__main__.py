"""`python -m jaxbn.parity`: the conventions of the batch norms installed here, and their errors."""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxbn.parity import _table
from jaxbn.parity._frameworks import FRAMEWORKS
from jaxbn.parity._survey import survey


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jaxbn.parity", description=__doc__)
    others = [name for name in FRAMEWORKS if name != "ours"]
    parser.add_argument(
        "--frameworks",
        default=",".join(others),
        help="which to look at beside this library, separated by commas; by default %(default)s",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64", "bfloat16"],
        default="float32",
        help="of the hard inputs; conventions are looked for in float32",
    )
    parser.add_argument("--device", help="cpu, gpu or tpu; by default the one that JAX takes")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print all numbers")
    form.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw the errors")
    options = parser.parse_args(arguments)

    names = [name for name in options.frameworks.split(",") if name]
    if unknown := sorted(set(names) - set(others)):
        parser.error(f"unknown frameworks {', '.join(unknown)}; there are {', '.join(others)}")
    terminal = not (options.json or options.markdown)
    for package, wanted in (("rich", terminal), ("matplotlib", options.png is not None)):
        if wanted and importlib.util.find_spec(package) is None:
            parser.error(
                f"{package} is missing: pip install 'jaxbn[parity]', or ask for --json or "
                "--markdown, without --png"
            )
    device = options.device or jax.default_backend()
    try:
        jax.devices(device)
    except RuntimeError as error:
        parser.error(f"no device {device!r}: {error}")

    if options.png is not None:
        try:
            options.png = _table.picture_path(options.png)
        except ValueError as error:
            parser.error(f"argument --png: {error}")

    found = survey(["ours", *names], options.dtype, device)
    if options.json:
        print(json.dumps(found, indent=2))
    elif options.markdown:
        print(_table.markdown(found))
    else:
        _table.show(found)
    if options.png is not None:
        _table.picture(found, options.png)


if __name__ == "__main__":
    main()
