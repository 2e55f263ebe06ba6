"""Run the code of pages of the documentation."""

import re
from functools import cache
from pathlib import Path

import jax

DOCS = Path(__file__).parent.parent / "docs"


@cache
def run_sections(page, *headings):
    """Return the names that a page defines before its first section, and in these sections.

    The code runs as users run it, in float32 and with JAX's default promotion.
    """
    introduction, *sections = re.split(r"^## ", (DOCS / page).read_text(), flags=re.M)
    by_heading = dict(section.split("\n", 1) for section in sections)
    names: dict = {}
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for text in (introduction, *(by_heading[heading] for heading in headings)):
            for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
                exec(compile(block, page, "exec"), names)
    return names
