"""Change the options of the batch norms of an NNX model without changing its code."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax
from flax import nnx

from jaxbn import _layers
from jaxbn._patterns import as_text
from jaxbn._rules import FLAX_LACKS, Overridden, Rules
from jaxbn.nnx._batch_norm import BatchNorm, hashable


def override(model: nnx.Module, rules: Mapping[str, Mapping[str, Any]]) -> None:
    """Change the options of a model's batch norms, in place.

    The model's code is unchanged, its variables remain the same objects, and shared layers remain
    shared. A batch norm that a rule matches computes as `jaxbn.nnx.BatchNorm` does from then on,
    even if it is Flax's own layer or of a derived class. It keeps its options, except for those
    that the rule changes. Other batch norms are unchanged.

    `frozen` and `track` remain in effect when `model.train()`, `model.eval()`, `nnx.view` or a call
    sets `use_running_average`. To undo a rule, override again.

    Call it outside of `nnx.jit` and other transforms, as it changes the classes of Flax's layers. A
    derived class must call the `__call__` of its base class.

    Args:
      model: the model.
      rules: a mapping from patterns to options. A pattern matches paths of layers, such as
        "blocks/0/norm": "*" matches any characters of a name, "**" any number of names, including
        none. A shared layer has its first path, as in `nnx.state(model)`. The options are a mapping
        with any of `frozen`, `track`, `momentum`, `epsilon`, `axis_name`, `axis_index_groups`,
        `virtual_batch_size`, `batch_variance` and `running_variance`, with the meaning they have in
        `jaxbn.nnx.BatchNorm`, and `r_max` and `d_max`, which turn a layer into a
        `jaxbn.nnx.BatchRenorm`. If several rules match a layer, the later ones win.

    Raises:
      TypeError: `model` is not an `nnx.Module`, or `rules` is not a mapping of strings to mappings.
      ValueError: an option is unknown or has an invalid value, or a pattern matches no batch norm
        of the model. The model is then unchanged.

    Example:
      >>> import jax, jaxbn.nnx
      >>> from flax import nnx
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (64, 4))
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
      >>> jaxbn.nnx.override(model, {"**": {"frozen": True}})
      >>> model.train()
      >>> y = model(x)
      >>> print(model.layers[1].mean[...])
      [0. 0. 0. 0. 0. 0. 0. 0.]
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}.")
    checked_rules = Rules(rules)
    layers = {
        as_text(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, BatchNorm | nnx.BatchNorm)
    }
    checked_rules.called.update(layers)
    checked_rules.check_matched()
    changes = {path: checked_rules.options(path) for path in layers}
    for path, options in changes.items():
        if options:
            _layers.checked_options(Overridden(layers[path], options))
    for path, options in changes.items():
        if options:
            _change(layers[path], options)


def _change(layer: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(layer, BatchNorm):
        object.__setattr__(layer, "__class__", _of_this_library(type(layer)))
        layer.count = nnx.data(None)
        options = {**FLAX_LACKS, **options}
    for name, value in options.items():
        # An array is an input of `nnx.jit`, and anything else a constant.
        keep = nnx.data if isinstance(value, jax.Array) else nnx.static
        setattr(layer, name, keep(hashable(value)))


class FlaxBatchNorm(BatchNorm, nnx.BatchNorm):
    """Flax's layer with the computation of this library."""


@cache
def _of_this_library(layer_class: type) -> type:
    """Return a subclass of a class of Flax's layers that computes as this library's layers do."""
    if layer_class is nnx.BatchNorm:
        return FlaxBatchNorm
    # Insert it between the derived class and its base, for calls of `super().__call__`.
    return type(layer_class.__name__, (layer_class, FlaxBatchNorm), {})
