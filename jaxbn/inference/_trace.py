"""Trace a model of either of Flax's interfaces."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxbn import _checks
from jaxbn.inference import _linen_variables
from jaxbn.inference._traced_model import TracedModel


def traced_model(
    model: Any, variables: Any, example: Any, apply_kwargs: Mapping[str, Any]
) -> TracedModel:
    """Return a Linen or NNX model, traced in evaluation mode."""
    import flax.linen as nn
    from flax import nnx

    from jaxbn.inference._trace_linen import trace_linen
    from jaxbn.inference._trace_nnx import trace_nnx

    # What is checked on the example is rounded as its dtype tells, on every device.
    with jax.default_matmul_precision("highest"):
        if isinstance(model, nn.Module):
            _checks.mapping("variables of a flax.linen.Module", variables)
            plain = _linen_variables.plain_dicts(variables)
            return trace_linen(model, plain, example, apply_kwargs)
        if isinstance(model, nnx.Module):
            return trace_nnx(model, variables, example, apply_kwargs)
    raise TypeError(
        f"model must be a flax.linen.Module or a flax.nnx.Module, got {type(model).__name__}."
    )


def check_example(example: Any) -> None:
    """Reject an example without values, on which nothing can be checked."""
    if example is None:
        raise TypeError("example must be an input of model, got None.")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(example)):
        raise TypeError(
            "example must hold arrays, on which the folded layers are checked, got "
            "jax.ShapeDtypeStruct."
        )
