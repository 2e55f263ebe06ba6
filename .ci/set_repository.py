#!/usr/bin/env python3
"""Replace the repository's address wherever it is written: .ci/set_repository.py ADDRESS"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = (
    "pyproject.toml",
    "README.md",
    "CITATION.cff",
    "SECURITY.md",
    ".github/ISSUE_TEMPLATE/config.yml",
)
ADDRESS = re.compile(r"https://github\.com/[\w.-]+/[\w.-]*\w")


def set_repository(address: str, root: Path = ROOT) -> None:
    """Write `address`, such as https://github.com/OWNER/NAME, into the files of `root`."""
    if not ADDRESS.fullmatch(address) or address.endswith(".git"):
        raise ValueError(f"the address must be https://github.com/OWNER/NAME, got {address}.")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    old, new = (a.partition("github.com/")[2] for a in (project["urls"]["Repository"], address))
    # Of the README's pictures, the files themselves are linked.
    written = re.compile(
        rf"(https://(?:raw\.githubusercontent|github)\.com/){re.escape(old)}(?![\w-])"
    )
    for name in FILES:
        path = root / name
        path.write_text(written.sub(rf"\g<1>{new}", path.read_text()))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        set_repository(sys.argv[1])
    except ValueError as error:
        sys.exit(f"error: {error}")
