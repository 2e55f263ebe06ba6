"""Observe the batch norms of an NNX model by changing the class of the layers in a copy."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from flax import nnx

from jaxbn.calibrate import _observe
from jaxbn.calibrate._batches import arguments
from jaxbn.calibrate._called_layers import CalledLayers, record
from jaxbn.calibrate._normalize import normalize
from jaxbn.calibrate._observe import OBSERVED, PRESCRIBED, CallMoments, Observation, PerCall
from jaxbn.nnx._batch_norm import BatchNorm, promoted

_BATCH_NORMS = (BatchNorm, nnx.BatchNorm)


def observable_nnx(
    model: Any, variables: Any, apply_kwargs: Mapping[str, Any]
) -> _observe.ObservableModel:
    """Return an NNX model as `observable` does."""
    if not isinstance(variables, nnx.State):
        raise TypeError(
            f"variables of an NNX model must be an nnx.State, such as nnx.state(model), got "
            f"{type(variables).__name__}."
        )
    called = CalledLayers()
    # `variables` may be only a part of the model's.
    graphdef, all_variables = (model, variables)
    if isinstance(model, nnx.Module):
        graphdef, all_variables = nnx.split(model)

    def observe(
        states: Any, prescribed: PerCall[CallMoments], batch: Any, every_call: bool
    ) -> Observation:
        all_variables, variables = states
        copy = nnx.merge(graphdef, all_variables)
        nnx.update(copy, variables)
        layers: dict[Any, Any] = {
            path: node for path, node in nnx.iter_graph(copy) if isinstance(node, _BATCH_NORMS)
        }
        for path, layer in layers.items():
            object.__setattr__(layer, "__class__", _observing(type(layer)))
            layer.calibrate_path, layer.calibrate_every_call = path, every_call
            for i, call in enumerate(prescribed.get(path, ())):
                setattr(layer, f"{PRESCRIBED}{i}", nnx.BatchStat(call))
        args, kwargs = arguments(batch)
        with _observe.observing(called, every_call):
            output = copy(*args, **kwargs, **apply_kwargs)
        calls = _observe.by_layer(
            {
                (*path, name): value.get_value()
                for path, layer in layers.items()
                for name, value in vars(layer).items()
                if name.startswith(OBSERVED)
            }
        )
        return Observation(calls, output)

    return _observe.ObservableModel(
        observe, (all_variables, variables), variables, lambda statistics: statistics, called
    )


@cache
def _observing(layer_class: type) -> type:
    """Return the class that the layers of a class get while they are observed."""
    # A layer of Flax that `jaxbn.nnx.override` changed is of both classes and computes as ours.
    base = next(norm for norm in _BATCH_NORMS if issubclass(layer_class, norm))

    def __call__(self, *args, **kwargs):
        x, use_running_average, mask = _observe.call_arguments(*args, **kwargs)
        record(self.calibrate_path, self, x)
        if not _observe.is_observed(self, use_running_average, self.calibrate_every_call):
            return base.__call__(self, *args, **kwargs)
        call = _observe.next_call(lambda name: hasattr(self, name))
        given = getattr(self, f"{PRESCRIBED}{call}", None)
        given = None if given is None else given.get_value()
        variables = (self.mean, self.var, self.scale, self.bias)
        values = (None if v is None else v.get_value() for v in variables)
        (x, _, _, scale, bias), dtype = promoted(self, x, *values)
        y, observed = normalize(self, x, mask, {"scale": scale, "bias": bias}, given, dtype)
        setattr(self, f"{OBSERVED}{call}", nnx.BatchStat(observed))
        return y

    observing = type(base.__name__, (base,), {"__call__": __call__})
    # Insert it between the derived class and its base, for calls of `super().__call__`.
    if layer_class is base:
        return observing
    return type(layer_class.__name__, (layer_class, observing), {})
