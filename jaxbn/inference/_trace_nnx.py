"""Trace an NNX model in evaluation, with its layers and batch norms marked."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
from flax import nnx

from jaxbn.calibrate._batches import arguments, join, split
from jaxbn.calibrate._observe import call_arguments, is_observed
from jaxbn.inference._program import program
from jaxbn.inference._tags import Path, Place, is_floating_array, tagged
from jaxbn.inference._traced_model import (
    NO_BIAS,
    LayerFacts,
    NormFacts,
    TracedModel,
    check_evaluation,
    layer_facts,
    norm_facts,
)
from jaxbn.nnx._batch_norm import BatchNorm

_BATCH_NORMS = (BatchNorm, nnx.BatchNorm)
_LAYERS = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral, nnx.Einsum)


class _Marking:
    """The facts about the layers and batch norms that were called."""

    def __init__(self) -> None:
        self.layers: dict[Path, LayerFacts] = {}
        self.norms: dict[Path, NormFacts] = {}
        self.marked_outputs = 0


# Its value is part of the keys of JAX's caches of traces, so that no trace without marks is reused.
_MARKING: Any = jax.make_user_context(None)


def trace_nnx(
    model: nnx.Module, variables: Any, example: Any, apply_kwargs: Mapping[str, Any]
) -> TracedModel:
    """Return an NNX model, traced with these variables, or its own, and an example input."""
    if variables is not None:
        if not isinstance(variables, nnx.State):
            raise TypeError(
                f"variables of an NNX model must be None or an nnx.State, such as "
                f"nnx.state(model), got {type(variables).__name__}."
            )
        model = nnx.clone(model)
        nnx.update(model, variables)
    graphdef, state = nnx.split(model)
    arrays, constants = split(example)
    marking = _Marking()

    def call(state, arrays):
        copy = nnx.merge(graphdef, state)
        for path, node in modules(copy).items():
            _mark(node, path)
        args, kwargs = arguments(join(arrays, constants))
        with _MARKING(marking):
            output = copy(*args, **kwargs, **apply_kwargs)  # type: ignore[operator]
        return [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]

    traced = program(jax.make_jaxpr(call)(state, arrays))
    structure = jax.tree.structure(state)
    numbered = jax.tree.unflatten(structure, traced.inputs[: structure.num_leaves])
    numbers = {as_names(path): number for path, number in _flat(nnx.to_pure_dict(numbered))}
    parameters, layers = {}, {}
    nodes = modules(model)
    for path, facts in marking.layers.items():
        held = [name for name in ("kernel", "bias") if getattr(nodes[path], name, None) is not None]
        parameters[path] = {name: numbers[*path, name] for name in held if (*path, name) in numbers}
        layers[path] = facts._replace(
            problem=facts.problem or _problem(nodes[path], facts, held, parameters[path])
        )
    leaves = jax.tree.leaves(state)
    return TracedModel(traced, leaves, arrays, layers, marking.norms, parameters)


def modules(model: nnx.Module) -> dict[Path, Any]:
    """Return the batch norms and the layers with kernels of a model, by path."""
    return {
        as_names(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, _BATCH_NORMS)
        or (isinstance(node, nnx.Module) and isinstance(getattr(node, "kernel", 0), nnx.Variable))
    }


def as_names(path: Any) -> Path:
    return tuple(map(str, path))


def _flat(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    if not isinstance(tree, Mapping):
        return [(path, tree)]
    return [item for key, value in tree.items() for item in _flat(value, (*path, key))]


def _problem(
    layer: Any, facts: LayerFacts, held: list[str], parameters: Mapping[str, int]
) -> str | None:
    """Return why nothing can be folded into a layer, or None."""
    shared = [name for name in held if name not in parameters]
    if shared:
        return f"it shares its {' and '.join(shared)} with another layer"
    if "bias" not in held and not facts.kind:
        return NO_BIAS
    return None


def _mark(node: Any, path: Path) -> None:
    """Change the class of a layer or batch norm to one that marks its input and output."""
    is_norm = isinstance(node, _BATCH_NORMS)
    bases: tuple[Any, ...] = _BATCH_NORMS if is_norm else _LAYERS
    make = _marking_norm if is_norm else _marking_layer
    base = next((c for c in bases if isinstance(node, c)), type(node))
    kernel = getattr(node, "kernel", None)
    object.__setattr__(node, "__class__", _derived(type(node), base, make))
    # Paths are part of the graph definition, so that equal blocks in nnx.jit are traced one by one.
    node.inference_path = path
    node.inference_kernel_shape = None if kernel is None else tuple(kernel.shape)


@cache
def _derived(layer_class: type, base: type, make: Callable[[type, type], Any]) -> type:
    """Return a class for the layers of a class in which `make` gives the call of `base`."""
    marking = type(base.__name__, (base,), {"__call__": make(base, layer_class)})
    # Insert it between the derived class and its base, for calls of `super().__call__`.
    return (
        marking if layer_class is base else type(layer_class.__name__, (layer_class, marking), {})
    )


def _marking_norm(base: Any, layer_class: Any) -> Any:
    has_own_call = layer_class.__call__ not in [norm.__call__ for norm in _BATCH_NORMS]

    def __call__(self, *args, **kwargs):
        path = self.inference_path
        x, use_running_average, mask = call_arguments(*args, **kwargs)
        is_training = is_observed(self, use_running_average, every_call=False)
        check_evaluation(path, is_training, "call model.eval() first")
        x = tagged(x, Place.NORM_INPUT, path)
        y = base.__call__(self, x, use_running_average, mask=mask)
        facts = norm_facts(self, path, x, mask, y.dtype)
        if has_own_call:
            own = f"{'/'.join(path)} is of the class {layer_class.__name__}, which has its own call"
            facts = facts._replace(problem=own)
        _MARKING.value.norms[path] = facts
        return tagged(y, Place.NORM_OUTPUT, path)

    return __call__


def _marking_layer(base: Any, layer_class: Any) -> Any:
    def __call__(self, *args, **kwargs):
        path, marking = self.inference_path, _MARKING.value
        args, kwargs = tagged((args, kwargs), Place.LAYER_INPUT, path)
        before = marking.marked_outputs
        y = base.__call__(self, *args, **kwargs)
        # A layer that is marked inside of this one's call does its work.
        if marking.marked_outputs > before or not is_floating_array(y):
            return y
        marking.marked_outputs += 1
        kernel = self.kernel.get_value()
        marking.layers[path] = layer_facts(self, kernel, self.inference_kernel_shape)
        return tagged(y, Place.LAYER_OUTPUT, path)

    return __call__
