"""Run a Linen module, and record its submodules by an interceptor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from jaxbn.parity._adapters.flax import linen_layer
from jaxbn.parity._layer import DifferentiableLayer
from jaxbn.parity._networks import layers
from jaxbn.parity._networks.jax_network import JaxNetwork, Recorder, TracedStatistics
from jaxbn.parity._networks.options import CallOptions

if TYPE_CHECKING:
    import flax.linen as nn


class LinenNetwork(JaxNetwork):
    """A Linen module with its variables, or without any if only its calls are wanted."""

    def __init__(
        self,
        label: str,
        module: nn.Module,
        variables: Mapping[str, Any] | None,
        options: CallOptions,
    ):
        super().__init__(label, variables)
        self.module, self.options = module, options
        self._batch_norms: dict[str, nn.Module] = {}

    def forward(
        self, variables: Any, x: jax.Array, train: bool, recorder: Recorder
    ) -> tuple[Any, TracedStatistics]:
        import flax.linen as nn

        def intercept(call, args, kwargs, context):
            module = context.module
            name = "/".join(module.path)
            # Only calls of `__call__` are recorded, not those of other methods.
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            if isinstance(module, nn.Dropout) and _is_active(module, *args, **kwargs):
                recorder.dropouts.append(name)
            if hasattr(module, "use_running_average"):
                self._batch_norms[name] = module.clone(parent=None)
            axis = getattr(module, "axis", None)
            return recorder.record(name, lambda: _facts(module), axis, call, args, kwargs)

        options: dict[str, Any] = {"rngs": {"params": jax.random.key(0)}}
        options |= self.options.of(type(self.module).__call__, train)
        with nn.intercept_methods(intercept):
            if variables is None:
                rngs = options.pop("rngs")
                output, updates = self.module.init_with_output(rngs, x, **options)
            else:
                output, updates = self.module.apply(
                    variables, x, mutable=["batch_stats"], **options
                )
        statistics = {
            "/".join(path): (node["mean"], node["var"])
            for path, node in _nodes(nn.meta.unbox(updates.get("batch_stats") or {}))
            if hasattr(node.get("mean"), "shape") and hasattr(node.get("var"), "shape")
        }
        return output, statistics

    def batch_norm(self, name: str) -> DifferentiableLayer | None:
        if name not in self._batch_norms:
            return None
        variables = {}
        for collection in ("params", "batch_stats"):
            node = self.variables.get(collection, {})
            for key in name.split("/") if name else ():
                node = node.get(key, {})
            variables[collection] = node
        return linen_layer(self._batch_norms[name], variables)


def _is_active(module: nn.Dropout, inputs: Any, deterministic: bool | None = None, **_: Any):
    if deterministic is None:
        deterministic = module.deterministic
    return module.rate > 0 and not deterministic


def _facts(module: nn.Module) -> layers.Facts | None:
    import flax.linen as nn

    def shapes(collection: str) -> dict[str, layers.Shape]:
        leaves = nn.meta.unbox(module.variables.get(collection, {}))
        return {k: tuple(v.shape) for k, v in leaves.items() if hasattr(v, "shape")}

    return layers.of_flax(module, shapes("params"), shapes("batch_stats"))


def _nodes(tree: Mapping[str, Any], path: tuple[str, ...] = ()):
    """Yield each mapping in a tree of mappings, with its path."""
    yield path, tree
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _nodes(child, (*path, name))
