"""Compile functions like `jax.jit`, but compile equal programs only once."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

# Compiled functions of lists of arrays, by the text of their programs. The oldest are dropped.
_compiled: dict[str, Callable[..., list[Any]]] = {}
_MAX_COMPILED = 128

# A text with one of these words leaves out a part of the program: a Python function that it calls,
# or constants that JAX passes to it as arguments.
_INCOMPLETE = ("callback", "jax.const")


def shared_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, compiled, for positional arguments that are pytrees of arrays.

    Each function is traced, which is much cheaper than compiling. Functions share a compiled
    program if the texts of their programs, including all constants, are equal. The names in their
    pytrees may differ.
    """
    jitted = jax.jit(function)
    # By the traced programs. JAX returns an earlier one for arguments of the same types, as long as
    # its configuration is the same.
    programs = {}

    def call(*args: Any) -> Any:
        leaves, traced = jax.tree.leaves(args), jitted.trace(*args)
        if traced.jaxpr not in programs:
            programs[traced.jaxpr] = _compile(traced.jaxpr, leaves)
        results = jax.tree.structure(traced.out_info)
        return jax.tree.unflatten(results, programs[traced.jaxpr](*leaves))

    return call


def _compile(closed: Any, leaves: list[Any]) -> Callable[..., list[Any]]:
    """Return the compiled program of a closed jaxpr, or of an earlier one with the same text."""
    # If unused arguments were left out, functions that use different ones could look the same.
    program = jax.jit(jaxpr_as_fun(closed), keep_unused=True)
    text = program.lower(*leaves).as_text()
    if any(word in text for word in _INCOMPLETE):
        return program
    if text not in _compiled and len(_compiled) == _MAX_COMPILED:
        del _compiled[next(iter(_compiled))]
    return _compiled.setdefault(text, program)
