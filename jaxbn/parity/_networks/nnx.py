"""Run an NNX module, and record its submodules by changing the classes of those of a copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from typing import Any

import jax
from flax import nnx

from jaxbn.parity._adapters.flax import nnx_layer
from jaxbn.parity._layer import DifferentiableLayer
from jaxbn.parity._networks import layers
from jaxbn.parity._networks.jax_network import JaxNetwork, Recorder, TracedStatistics
from jaxbn.parity._networks.options import CallOptions


class NnxNetwork(JaxNetwork):
    """An NNX module, as the parts that `nnx.split` makes of it."""

    def __init__(self, label: str, graphdef: Any, state: Any, options: CallOptions):
        super().__init__(label, state)
        self.graphdef, self.options = graphdef, options

    def forward(
        self, variables: Any, x: jax.Array, train: bool, recorder: Recorder
    ) -> tuple[Any, TracedStatistics]:
        model: Any = nnx.merge(self.graphdef, variables, copy=True)
        options = self.options.of(type(model).__call__, train)
        model.train() if train else model.eval()
        modules = dict(_modules(model))
        for name, module in modules.items():
            # Transformations such as `nnx.remat` call copies, which have the same attributes.
            module.parity_name = name
            object.__setattr__(module, "__class__", _recording(type(module)))
        token = _active.set(recorder)
        try:
            output = model(x, **options)
        finally:
            _active.reset(token)
        statistics = {}
        for name, module in modules.items():
            mean, var = (getattr(module, k, None) for k in ("mean", "var"))
            if isinstance(mean, nnx.BatchStat) and isinstance(var, nnx.BatchStat):
                statistics[name] = (mean.get_value(), var.get_value())
        return output, statistics

    def batch_norm(self, name: str) -> DifferentiableLayer | None:
        module = dict(_modules(nnx.merge(self.graphdef, self.variables))).get(name)
        return nnx_layer(module) if hasattr(module, "use_running_average") else None


# The recorder of the forward pass that is being traced.
_active: ContextVar[Recorder] = ContextVar("active")


@cache
def _recording(module_class: type) -> type:
    """Return a class that records its calls while `_active` is set."""

    def __call__(self, *args, **kwargs):
        recorder, name = _active.get(), self.parity_name

        def call(*args, **kwargs):
            return module_class.__call__(self, *args, **kwargs)

        if isinstance(self, nnx.Dropout) and _is_active(self, *args, **kwargs):
            recorder.dropouts.append(name)
        axis = getattr(self, "axis", None)
        return recorder.record(name, lambda: _facts(self), axis, call, args, kwargs)

    return type(module_class.__name__, (module_class,), {"__call__": __call__})


def _modules(model: nnx.Module) -> Iterator[tuple[str, Any]]:
    """Yield each submodule that can be called, with its name, and the model itself."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module) and callable(node):
            yield "/".join(map(str, path)), node


def _is_active(module: nnx.Dropout, inputs: Any, *, deterministic: bool | None = None, **_: Any):
    if deterministic is None:
        deterministic = module.deterministic
    return module.rate > 0 and not deterministic


def _facts(module: nnx.Module) -> layers.Facts | None:
    def shapes(kind: type) -> dict[str, layers.Shape]:
        own = {k: v for k, v in vars(module).items() if isinstance(v, kind)}
        return {k: tuple(v.get_value().shape) for k, v in own.items()}

    return layers.of_flax(module, shapes(nnx.Param), shapes(nnx.BatchStat))
