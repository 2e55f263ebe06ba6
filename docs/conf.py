"""Sphinx: `sphinx-build --fail-on-warning docs out/site`."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "jaxbn"
author = copyright = "The jaxbn authors"
release = importlib.metadata.version("jaxbn")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
    "signatures",
]
templates_path = ["_templates"]
exclude_patterns = ["_templates", "_extensions"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# What stands between single backquotes in a docstring is code.
default_role = "code"

# A page for each module, with the names in its `__all__`.
autosummary_ignore_module_all = False
autosummary_imported_members = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_use_admonition_for_examples = False

html_theme = "furo"
html_title = "jaxbn"
