"""Sphinx: `sphinx-build --fail-on-warning docs out/site`."""

import jaxbn

project = "jaxbn"
author = copyright = "The jaxbn authors"
release = jaxbn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# What stands between single backquotes in a docstring is code.
default_role = "code"

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
napoleon_use_admonition_for_examples = False

html_theme = "furo"
html_title = "jaxbn"
