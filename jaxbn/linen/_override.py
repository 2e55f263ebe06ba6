"""Change the options of the batch norms of a Linen model without changing its code."""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import unwrap
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from jaxbn._patterns import as_text
from jaxbn._rules import Overridden, Rules
from jaxbn.linen._batch_norm import BatchNorm

Function = TypeVar("Function", bound=Callable[..., Any])

_BATCH_NORM_CALLS = [unwrap(layer.__call__) for layer in (BatchNorm, nn.BatchNorm)]
# The active rules, with those of the outermost `override` last. They are part of the keys of JAX's
# caches of traces, so compiled functions inside the model, such as those of `nn.jit`, are traced
# again for other rules.
_ACTIVE = jax.make_user_context(())
# Whether another interceptor calls the batch norms, as `calibrate` does to observe them. It has to
# apply the rules itself.
BATCH_NORMS_OBSERVED = jax.make_user_context(False)


def override(fn: Function, rules: Mapping[str, Mapping[str, Any]]) -> Function:
    """Return `model.apply` or `model.init` with other options for the model's batch norms.

    The model's code, its variables and its checkpoints are unchanged. A batch norm that a rule
    matches computes as `jaxbn.linen.BatchNorm` does, even if it is Flax's own layer or of a derived
    class. It keeps its options, except for those that the rule changes. Other batch norms are
    unchanged.

    It works under `jit` and other transforms, both around the model and inside it (`nn.jit`,
    `nn.remat`, `nn.scan`, `nn.vmap`). The result is a new function, so `jax.jit` does not confuse
    it with `fn`. To add rules, override the result again; the later rules win.

    Args:
      fn: `model.apply`, `model.init` or another function that runs a Linen model, such as
        `jaxbn.calibrate.recalibrate` and `jaxbn.health.check`.
      rules: a mapping from patterns to options. A pattern matches paths of layers in `batch_stats`,
        such as "backbone/BatchNorm_0": "*" matches any characters of a name, "**" any number of
        names, including none. The options are a mapping with any of `frozen`, `track`, `momentum`,
        `epsilon`, `axis_name`, `axis_index_groups`, `virtual_batch_size`, `batch_variance` and
        `running_variance`, with the meaning they have in `jaxbn.linen.BatchNorm`, and `r_max` and
        `d_max`, which turn a layer into a `jaxbn.linen.BatchRenorm`. If several rules match a
        layer, the later ones win.

    Returns:
      A function with the signature of `fn`. It raises ValueError if a pattern matches no batch norm
      that it calls, and none with statistics in the variables passed to it.

    Raises:
      TypeError: `fn` is not a function, or `rules` is not a mapping of strings to mappings.
      ValueError: an option is unknown or has an invalid value.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, jaxbn.linen
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (64, 4))
      >>> model = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False)])
      >>> variables = model.init(jax.random.key(1), x)
      >>> apply = jaxbn.linen.override(model.apply, {"**": {"frozen": True}})
      >>> y, updates = apply(variables, x, mutable=["batch_stats"])
      >>> print(updates["batch_stats"]["layers_1"]["mean"])
      [0. 0. 0. 0. 0. 0. 0. 0.]
    """
    if isinstance(fn, nn.Module) or not callable(fn):
        raise TypeError(
            f"fn must be a function that runs a Linen model, such as model.apply, got "
            f"{type(fn).__name__}."
        )
    checked_rules = Rules(rules)

    @wraps(fn)
    def overridden(*args, **kwargs):
        checked_rules.stored |= _paths_of_statistics(args[0] if args else kwargs.get("variables"))
        try:
            with _ACTIVE((checked_rules, *_ACTIVE.value)), nn.intercept_methods(_intercept):
                result = fn(*args, **kwargs)
        except Exception as error:
            # The reason may be a pattern that matches nothing, and so freezes no layer. Only the
            # variables tell all layers, as those behind the error were not called.
            if checked_rules.stored:
                checked_rules.check_matched(error)
            raise
        checked_rules.check_matched()
        return result

    return overridden  # type: ignore[return-value]


def is_batch_norm_call(context: Any) -> bool:
    """Return whether a method is the call of a batch norm, of this library or of Flax.

    A layer of a derived class is intercepted when it calls its base class.
    """
    return unwrap(context.orig_method.func) in _BATCH_NORM_CALLS


def with_rules(layer: Any) -> Any:
    """Return a batch norm with the options that the active rules give it."""
    path = as_text(layer.path)
    options: dict[str, Any] = {}
    for rules in _ACTIVE.value:
        rules.called.add(path)
        options |= rules.options(path)
    return Overridden(layer, options) if options else layer


def call_with_rules(next_fun, args, kwargs, context):
    """Call a batch norm with the options that the active rules give it."""
    layer = with_rules(context.module)
    if layer is context.module:
        return next_fun(*args, **kwargs)
    return unwrap(BatchNorm.__call__)(layer, *args, **kwargs)


def _intercept(next_fun, args, kwargs, context):
    if is_batch_norm_call(context) and not BATCH_NORMS_OBSERVED.value:
        return call_with_rules(next_fun, args, kwargs, context)
    for rules in _ACTIVE.value:
        rules.visited.add(as_text(context.module.path))
    return next_fun(*args, **kwargs)


def _paths_of_statistics(variables: Any) -> set[str]:
    """Return the paths of the layers that have running statistics in the variables of a model."""
    if not isinstance(variables, Mapping) or not isinstance(variables.get("batch_stats"), Mapping):
        return set()
    statistics = flatten_dict(variables["batch_stats"])
    return {as_text(path[:-1]) for path in statistics if path[-1] == "mean"}
