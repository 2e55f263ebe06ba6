"""Show signatures and presets as a reader would write them."""

import inspect
import re
from collections.abc import Mapping
from typing import Any

import jax.typing
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

# The representations of defaults, and what to show instead.
_READABLE = (
    (re.compile(r", parent=<.*"), ")"),  # Flax adds it, and a name, to every Linen module.
    (re.compile(r"<function (\w+)(?: at 0x\w+)?>"), r"\1"),
    (re.compile(r"<class '([\w.]+)'>"), r"\1"),
    (re.compile(r"mappingproxy\((.*?)\)"), r"\1"),
)
# The private module of a public type.
_PRIVATE_MODULE = re.compile(r"\bjaxbn(?:\.\w+)*\._\w+(?:\.\w+)*\.(?=\w)")


class ArrayLike:
    """Stands for JAX's union of that name, whose members would be listed."""


class DTypeLike:
    """Stands for JAX's union of that name, whose members would be listed."""


def name_jax_types() -> None:
    """Keep the names of JAX's unions, if the library has not been imported yet."""
    for stand_in in (ArrayLike, DTypeLike):
        stand_in.__module__ = "jax.typing"
        setattr(jax.typing, stand_in.__name__, stand_in)


def readable_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str
) -> tuple[str, str] | None:
    if what == "class" and (signature or "").startswith("(*args"):
        # The metaclass takes anything. A protocol has no arguments.
        if getattr(obj, "_is_protocol", False):
            return "", ""
        _, *parameters = inspect.signature(obj.__init__).parameters.values()
        bare = [one.replace(annotation=inspect.Parameter.empty) for one in parameters]
        signature = str(inspect.Signature(bare))
    if signature is None:
        return None
    for pattern, text in _READABLE:
        signature = pattern.sub(text, signature)
    return signature, returned


def describe_preset(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what == "data" and isinstance(obj, Mapping):
        # Presets are defined in a private module, with comments that Sphinx looks for here.
        comments = ModuleAnalyzer.for_module("jaxbn._conventions").find_attr_docs()
        lines[:] = [*comments["", name.rpartition(".")[2]], f"``{dict(obj)}``", ""]


def drop_private_modules(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = [_PRIVATE_MODULE.sub("", line) if ":type:" in line else line for line in lines]


def skip_fields(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool:
    # The docstring of the class documents them, and their defaults come with other docstrings.
    is_default = callable(obj) and not obj.__module__.startswith("jaxbn.")
    return skip or is_default or (inspect.getdoc(obj) or "").startswith("Alias for field number")


def setup(app: Sphinx) -> dict[str, bool]:
    name_jax_types()
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("autodoc-process-docstring", describe_preset)
    # After Napoleon, which writes the types of attributes.
    app.connect("autodoc-process-docstring", drop_private_modules, priority=900)
    app.connect("autodoc-skip-member", skip_fields)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
