"""Compile functions like `jax.jit`, but compile equal programs only once."""

from collections.abc import Callable
from typing import Any

import jax
from jax.core import eval_jaxpr

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
    programs = {}

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        signature = structure, *(jax.typeof(leaf) for leaf in leaves)
        if signature not in programs:
            traced = jax.jit(function).trace(*args)
            results = jax.tree.structure(traced.out_info)
            programs[signature] = _compile(traced.jaxpr, leaves), results
        program, results = programs[signature]
        return jax.tree.unflatten(results, program(*leaves))

    return call


def _compile(closed: Any, leaves: list[Any]) -> Callable[..., list[Any]]:
    """Return the compiled program of a closed jaxpr, or of an earlier one with the same text."""
    # If unused arguments were left out, functions that use different ones could look the same.
    program = jax.jit(
        lambda *leaves: eval_jaxpr(closed.jaxpr, closed.consts, *leaves), keep_unused=True
    )
    text = program.lower(*leaves).as_text()
    if any(word in text for word in _INCOMPLETE):
        return program
    if text not in _compiled and len(_compiled) == _MAX_COMPILED:
        del _compiled[next(iter(_compiled))]
    return _compiled.setdefault(text, program)
