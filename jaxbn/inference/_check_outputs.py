"""Check on an example input that folded layers compute what their batch norms computed."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxbn.inference._pairs import Pair
from jaxbn.inference._program import run
from jaxbn.inference._tags import Path, Place, Tag, as_text
from jaxbn.inference._traced_model import TracedModel

Entries = Mapping[str, Any]


class Replacement(NamedTuple):
    """A pair, and new kernels and biases of its layer.

    Attributes:
      folded: those that make the layer compute what layer and batch norm computed.
      magnitudes: those with which it computes the sum of the absolute values of the terms that are
        rounded.
    """

    pair: Pair
    folded: Entries
    magnitudes: Entries


class _Comparison(NamedTuple):
    """How the outputs of a pair compare.

    Attributes:
      excess: the largest difference as a multiple of its tolerance.
      has_input: whether an input of the layer has a value other than zero.
      has_output: whether the output of the batch norm has a finite value.
    """

    excess: Any
    has_input: Any
    has_output: Any


def check_outputs(traced: TracedModel, replacements: Sequence[Replacement]) -> None:
    """Compare the output of each folded layer with that of its batch norm, on the example input.

    Every other layer gets the same input in both runs, so errors do not add up over layers. Traced
    values are not compared.
    """
    values = [*traced.variables, *traced.arrays]
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((values, replacements))):
        return
    entries = [(new.folded, new.magnitudes) for new in replacements]
    pairs = [new.pair for new in replacements]
    with jax.default_matmul_precision("highest"):
        comparisons = jax.jit(partial(_compared, traced, pairs))(values, entries)
    for pair, (excess, has_input, has_output) in zip(pairs, comparisons, strict=True):
        if not has_input or not has_output:
            why = f"the output of {as_text(pair.norm)} has no finite value"
            why = why if has_input else f"the input of {as_text(pair.layer)} is zero"
            raise ValueError(
                f"example must be one on which the folded layers can be checked, but {why}. Pass "
                f"an input from the data, or leave this pair out of pairs."
            )
        if not excess <= 1:
            raise ValueError(
                f"{as_text(pair.layer)} and {as_text(pair.norm)} cannot be folded: on example, the "
                f"folded layer's output differs from the batch norm's by {float(excess):.3g} times "
                f"what rounding explains. The output of {as_text(pair.layer)} may not be linear in "
                f"its kernel and bias, or its folded values are out of the range of their dtype."
            )


def _compared(
    traced: TracedModel, pairs: Sequence[Pair], values: list[Any], entries: Any
) -> list[_Comparison]:
    """Return how the outputs of each pair compare."""
    expected: dict[Path, jax.Array] = {}
    has_input: dict[Path, Any] = {}

    def record(tag: Tag, value: Any) -> Any:
        if tag.place is Place.NORM_OUTPUT:
            expected[tag.path] = value
        if tag.place is Place.LAYER_INPUT:
            has_input[tag.path] = has_input.get(tag.path, False) | jnp.any(value != 0)
        return value

    run(traced.program, values, record)
    folded = _outputs(traced, pairs, values, [new for new, _ in entries], expected)
    sizes = _outputs(traced, pairs, values, [sizes for _, sizes in entries], expected, jnp.abs)
    comparisons = []
    for pair, (new, _) in zip(pairs, entries, strict=True):
        outputs = (of_norm[pair.norm] for of_norm in (expected, folded, sizes))
        excess = jnp.max(_excess(traced, pair, new, *outputs))
        has_output = jnp.any(jnp.isfinite(expected[pair.norm]))
        # Inputs of integers are not marked.
        comparisons.append(_Comparison(excess, has_input.get(pair.layer, True), has_output))
    return comparisons


def _outputs(
    traced: TracedModel,
    pairs: Sequence[Pair],
    values: Sequence[Any],
    entries: Sequence[Entries],
    expected: Mapping[Path, Any],
    of_input: Any = lambda x: x,
) -> dict[Path, Any]:
    """Return what each batch norm gets if its layer has these entries.

    The batch norms pass on their expected outputs.
    """
    values, biases, got = list(values), {}, {}
    norms = {pair.norm for pair in pairs}
    layers = {pair.layer for pair in pairs}
    positions = {number: k for k, number in enumerate(traced.program.inputs)}
    for pair, new in zip(pairs, entries, strict=True):
        numbers = traced.parameters[pair.layer]
        (kernel,), (bias,) = (jax.tree.leaves(new[key]) for key in ("kernel", "bias"))
        values[positions[numbers["kernel"]]] = kernel
        if "bias" in numbers:
            values[positions[numbers["bias"]]] = bias
        else:
            biases[pair.layer] = bias

    def change(tag: Tag, value: Any) -> Any:
        if tag.place is Place.LAYER_INPUT and tag.path in layers:
            return of_input(value)
        if tag.place is Place.LAYER_OUTPUT and tag.path in biases:
            bias = biases[tag.path].astype(value.dtype)
            return value + bias.reshape((1,) * (value.ndim - bias.ndim) + bias.shape)
        if tag.place is Place.NORM_INPUT and tag.path in norms:
            got[tag.path] = value
        if tag.place is Place.NORM_OUTPUT and tag.path in norms:
            return expected[tag.path]
        return value

    run(traced.program, values, change)
    return got


def _excess(
    traced: TracedModel, pair: Pair, new: Entries, expected: Any, got: Any, size: Any
) -> jax.Array:
    """Return the difference of two outputs, elementwise, as a multiple of the tolerance."""
    kernel_shape = traced.layers[pair.layer].kernel_shape
    products = math.prod(kernel_shape) / kernel_shape[pair.axis]
    dtypes = {expected.dtype, got.dtype, size.dtype}
    # The folded kernel and bias are rounded to the dtypes in which they are stored.
    stored = {leaf.dtype for leaf in jax.tree.leaves(new)}
    roundoff = max(float(jnp.finfo(dtype).eps) for dtype in dtypes | stored) / 2
    wide = jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32
    # Each run sums this many products and rounds each of them, and is rounded to its dtype about
    # ten times on the way. Sums of half precision are accumulated in float32.
    relative = 2 * products * min(roundoff, float(jnp.finfo(jnp.float32).eps) / 2) + 10 * roundoff
    expected, got, size = (value.astype(wide) for value in (expected, got, size))
    smallest = max(float(jnp.finfo(dtype).tiny) for dtype in dtypes)
    excess = jnp.abs(got - expected) / (relative * size + smallest)
    # Where the model itself overflows, there is nothing to compare.
    return jnp.where(jnp.isfinite(expected), excess, 0)
