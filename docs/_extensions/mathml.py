"""Render formulas as MathML, which browsers show without a script from elsewhere."""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    # In reStructuredText, a blank line separates equations, and & aligns them.
    equations = [part for part in node.astext().split("\n\n") if part.strip()]
    text = r" \\ ".join(equations)
    if len(equations) > 1:
        text = rf"\begin{{split}}{text}\end{{split}}"
    translator.body.append(convert(text, display="block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_inline, None), block_renderers=(visit_block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
