"""Trace a Linen model in evaluation, with its layers and batch norms marked."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList
from flax.core.meta import unbox

from jaxbn.calibrate._batches import arguments, join, split
from jaxbn.calibrate._observe import call_arguments, is_observed
from jaxbn.inference import _linen_variables
from jaxbn.inference._program import program
from jaxbn.inference._tags import Path, Place, as_text, is_floating_array, tagged
from jaxbn.inference._traced_model import (
    NO_BIAS,
    LayerFacts,
    NormFacts,
    TracedModel,
    check_evaluation,
    layer_facts,
    norm_facts,
)
from jaxbn.linen._override import (
    BATCH_NORMS_OBSERVED,
    call_with_rules,
    is_batch_norm_call,
    with_rules,
)

# Its value is part of the keys of JAX's caches of traces, so that no trace without marks is reused.
_MARKING = jax.make_user_context(None)


def trace_linen(
    model: nn.Module, variables: Mapping[str, Any], example: Any, apply_kwargs: Mapping[str, Any]
) -> TracedModel:
    """Return a Linen model, traced with its variables, as plain dicts, and an example input."""
    marking = _Marking(variables)
    arrays, constants = split(example)
    options = {name: value for name, value in apply_kwargs.items() if name != "mutable"}

    def call(variables, arrays):
        args, kwargs = arguments(join(arrays, constants))
        marked = nn.intercept_methods(marking.intercept)
        with _MARKING(marking), BATCH_NORMS_OBSERVED(True), marked:
            # A model in evaluation may still write to collections such as a cache. Models also
            # find out whether they are in training mode by asking whether they may write to this.
            mutable = DenyList(("params", "batch_stats"))
            output, _ = model.apply(variables, *args, **kwargs, **options, mutable=mutable)
        return [leaf for leaf in jax.tree.leaves(output) if isinstance(leaf, jax.Array)]

    traced = program(jax.make_jaxpr(call)(variables, arrays))
    structure = jax.tree.structure(variables)
    numbered = jax.tree.unflatten(structure, traced.inputs[: structure.num_leaves])
    parameters = {}
    for path in marking.layers:
        entries = _linen_variables.module_entries(numbered.get("params", {}), path)
        entries = unbox({key: entries[key] for key in ("kernel", "bias") if key in entries})
        parameters[path] = {key: k for key, k in entries.items() if isinstance(k, int)}
    return TracedModel(
        traced, jax.tree.leaves(variables), arrays, marking.layers, marking.norms, parameters
    )


class _Marking:
    """Marks the inputs and outputs of layers and batch norms, and collects facts about them."""

    def __init__(self, variables: Mapping[str, Any]):
        self._params = variables.get("params", {})
        self._stats = variables.get("batch_stats", {})
        self.layers: dict[Path, LayerFacts] = {}
        self.norms: dict[Path, NormFacts] = {}
        self._marked_outputs = 0

    def intercept(self, next_fun, args, kwargs, context):
        if is_batch_norm_call(context):
            return self._norm(next_fun, args, kwargs, context)
        module = context.module
        if module.scope is not None and module.has_variable("params", "kernel"):
            kernel = unbox(module.get_variable("params", "kernel"))
            if is_floating_array(kernel):
                return self._layer(next_fun, args, kwargs, module, kernel)
        return next_fun(*args, **kwargs)

    def _norm(self, next_fun, args, kwargs, context):
        layer = with_rules(context.module)
        path = tuple(layer.scope.path)
        x, use_running_average, mask = call_arguments(*args, **kwargs)
        is_training = is_observed(layer, use_running_average, every_call=False)
        check_evaluation(path, is_training, "pass the model's arguments too, such as train=False")
        x = tagged(x, Place.NORM_INPUT, path)
        y = call_with_rules(next_fun, (x, use_running_average), {"mask": mask}, context)
        facts = norm_facts(layer, path, x, mask, y.dtype)
        if self._shares_scope(path):
            shares = f"{as_text(path)} shares its scope with another module (nn.share_scope)"
            facts = facts._replace(problem=shares)
        self.norms[path] = facts
        return tagged(y, Place.NORM_OUTPUT, path)

    def _layer(self, next_fun, args, kwargs, module, kernel):
        path = tuple(module.scope.path)
        args, kwargs = tagged((args, kwargs), Place.LAYER_INPUT, path)
        before = self._marked_outputs
        y = next_fun(*args, **kwargs)
        # A derived layer, or one that calls another of its methods, is marked by the inner call.
        if self._marked_outputs > before or not is_floating_array(y):
            return y
        self._marked_outputs += 1
        stored = _linen_variables.module_entries(self._params, path).get("kernel")
        facts = layer_facts(module, kernel, getattr(unbox(stored), "shape", None))
        # Linen ignores a bias that no layer reads, so the new model would lack it without an error.
        if not facts.kind and not module.has_variable("params", "bias"):
            facts = facts._replace(problem=facts.problem or NO_BIAS)
        self.layers[path] = facts
        return tagged(y, Place.LAYER_OUTPUT, path)

    def _shares_scope(self, norm: Path) -> bool:
        """Return whether the variables of another module are among those of a batch norm."""
        entries = [
            entry
            for tree in (self._params, self._stats)
            for entry in _linen_variables.module_entries(tree, norm).items()
        ]
        return any(name == "kernel" or isinstance(entry, Mapping) for name, entry in entries)
