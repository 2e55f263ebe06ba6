"""Observe the batch norms of a Linen model by intercepting their calls."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax.core import DenyList, FrozenDict, unfreeze
from flax.core.meta import unbox
from flax.linen.dtypes import canonicalize_dtype
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxbn import _checks, _layers
from jaxbn.calibrate import _observe
from jaxbn.calibrate._batches import arguments
from jaxbn.calibrate._called_layers import CalledLayers, record
from jaxbn.calibrate._normalize import normalize
from jaxbn.calibrate._observe import OBSERVED, PRESCRIBED, CallMoments, Observation, PerCall
from jaxbn.linen._override import (
    BATCH_NORMS_OBSERVED,
    call_with_rules,
    is_batch_norm_call,
    with_rules,
)


def observable_linen(
    model: Any, variables: Any, apply_kwargs: Mapping[str, Any]
) -> _observe.ObservableModel:
    """Return a Linen model as `observable` does."""
    _checks.mapping("variables of a flax.linen.Module", variables)
    called = CalledLayers()
    options = {name: value for name, value in apply_kwargs.items() if name != "mutable"}

    def observe(
        variables: Any, prescribed: PerCall[CallMoments], batch: Any, every_call: bool
    ) -> Observation:
        def interceptor(next_fun, args, kwargs, context):
            if not is_batch_norm_call(context):
                return next_fun(*args, **kwargs)
            layer = with_rules(context.module)
            x, use_running_average, mask = _observe.call_arguments(*args, **kwargs)
            record(layer.scope.path, layer, x)
            if not _observe.is_observed(layer, use_running_average, every_call):
                return call_with_rules(next_fun, args, kwargs, context)

            call = _observe.next_call(lambda name: layer.has_variable("batch_stats", name))
            params = unbox({k: layer.get_variable("params", k) for k in _checks.PARAMS})
            dtype = canonicalize_dtype(x, *params.values(), dtype=layer.dtype)
            x = _layers.floating_input(x, layer.dtype)
            given = layer.get_variable("batch_stats", f"{PRESCRIBED}{call}")
            y, observed = normalize(layer, x, mask, params, given, dtype)
            layer.put_variable("batch_stats", f"{OBSERVED}{call}", observed)
            return y

        statistics = flatten_dict(unfreeze(variables.get("batch_stats", {})))
        for layer, calls in prescribed.items():
            statistics |= {(*layer, f"{PRESCRIBED}{i}"): call for i, call in enumerate(calls)}
        args, kwargs = arguments(batch)
        observing = _observe.observing(called, every_call)
        with observing, BATCH_NORMS_OBSERVED(True), nn.intercept_methods(interceptor):
            # A model in training may write to any collection but its parameters.
            output, updates = model.apply(
                {**variables, "batch_stats": unflatten_dict(statistics)},
                *args,
                **kwargs,
                **options,
                mutable=DenyList("params"),
            )
        calls = _observe.by_layer(flatten_dict(unfreeze(updates.get("batch_stats", {}))))
        return Observation(calls, output)

    def replace_statistics(statistics: Any) -> Any:
        new = {"batch_stats": statistics}
        if isinstance(variables, FrozenDict):
            return variables.copy(new)
        return {**variables, **new}

    statistics = variables.get("batch_stats", {})
    return _observe.ObservableModel(observe, variables, statistics, replace_statistics, called)
