"""Compile the forms of other platforms for the CPU.

`jaxbn._fusion` gives each platform a form of its own. All of them are plain JAX, so each compiles
for a CPU, too, with its own formulas and its own derivative.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _fusion

# "rocm" has the forms of "cuda", and every other platform those of "tpu", as test_fusion.py shows.
FORMS = ("cpu", "cuda", "tpu")


@contextmanager
def of(platform: str) -> Iterator[None]:
    """Trace functions inside this context as if for `platform`."""

    def by_platform(*arguments: jax.Array, **forms: Callable[..., Any]) -> Any:
        form = forms.get(platform, forms["default"])
        return form(*_fusion._varying_alike(*arguments))

    real = _fusion.by_platform
    # Forget earlier traces in another form.
    jax.clear_caches()
    _fusion.by_platform = by_platform
    try:
        yield
    finally:
        _fusion.by_platform = real
        jax.clear_caches()


def jit(function: Callable[..., Any], platform: str) -> Callable[..., Any]:
    """Return `function` compiled in the form of `platform`, once for each kind of arguments.

    The results are NumPy arrays, which extended precision can be subtracted from.
    """
    compiled = {}

    def run(*arguments: Any) -> Any:
        arguments = jax.tree.map(jnp.asarray, arguments)
        leaves, structure = jax.tree.flatten(arguments)
        kind = structure, *((leaf.aval, leaf.sharding) for leaf in leaves)
        if kind not in compiled:
            with of(platform):
                compiled[kind] = jax.jit(function).lower(*arguments).compile()
        return jax.tree.map(np.asarray, compiled[kind](*arguments))

    return run
