"""A Flax model, Linen or NNX, run with given statistics, and what its batch norms see."""

from collections.abc import Callable, Mapping
from functools import cache
from inspect import unwrap
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxbn import _checks
from jaxbn._batch_norm import batch_norm
from jaxbn._moments import Moments, moments, statistics_dtype
from jaxbn._pooling import Layer
from jaxbn._running import variance

# Names beside `mean` and `var`, each followed by the number of the layer's call. What goes into the
# model and comes out of it lies with the statistics, so that lifted transforms, `scan` over layers
# among them, treat it as they treat those.
_GIVEN, _SEEN = "calibrate_given_", "calibrate_seen_"


class Seen(NamedTuple):
    """The moments of what one call of a layer has seen, each of the shape of the layer's `mean`.

    Attributes:
      n, shift, mean, var: as in `Moments`.
      ddof: what the variance that the layer tracks divides by is `n - ddof`: 0 or 1. A scalar for
        each layer, so that layers in a `scan` have several.
    """

    n: Any
    shift: Any
    mean: Any
    var: Any
    ddof: Any


C = TypeVar("C")
# One for each call of each layer.
Network = dict[Layer, tuple[C, ...]]


class Model(NamedTuple):
    """A model as a function, and where its statistics are.

    Attributes:
      see: of the variables, what calls are given, a batch, and whether to watch the layers that are
        in evaluation mode too: what the calls have seen.
      variables: what `see` takes.
      statistics: the part of the caller's variables that holds the running statistics, a tree.
      with_statistics: the caller's variables with another such part.
    """

    see: Callable[..., Network[Seen]]
    variables: Any
    statistics: Any
    with_statistics: Callable[[Any], Any]


def as_function(model: Any, variables: Any, apply_kwargs: Mapping[str, Any]) -> Model:
    """`model` as a function of its variables, which stays as it is."""
    import flax.linen as nn
    from flax import nnx

    if isinstance(model, nn.Module):
        return _linen(model, variables, apply_kwargs)
    if isinstance(model, nnx.Module | nnx.GraphDef):
        return _nnx(model, variables, apply_kwargs)
    raise TypeError(
        f"model must be a flax.linen.Module, a flax.nnx.Module or a flax.nnx.GraphDef, got "
        f"{type(model).__name__}."
    )


def _linen(model: Any, variables: Any, apply_kwargs: Mapping[str, Any]) -> Model:
    import flax.linen as nn
    from flax.core import DenyList, FrozenDict, unfreeze
    from flax.core.meta import unbox
    from flax.traverse_util import flatten_dict, unflatten_dict

    from jaxbn.linen import BatchNorm

    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables of a flax.linen.Module must be a mapping of collections, got "
            f"{type(variables).__name__}."
        )
    bodies = [unwrap(layer.__call__) for layer in (BatchNorm, nn.BatchNorm)]
    options = {name: value for name, value in apply_kwargs.items() if name != "mutable"}

    def see(variables: Any, given: Network[Seen], batch: Any, everywhere: bool) -> Network[Seen]:
        def interceptor(next_fun, args, kwargs, context):
            # Of a layer that inherits, the call to the layer it inherits from.
            if unwrap(context.orig_method.func) not in bodies:
                return next_fun(*args, **kwargs)
            layer, (x, is_frozen, mask) = context.module, _arguments(*args, **kwargs)
            if is_frozen is None:
                is_frozen = layer.use_running_average
            if not everywhere and is_frozen is not False:
                return next_fun(*args, **kwargs)

            call = _first_free(lambda name: layer.has_variable("batch_stats", name))
            params = {name: layer.get_variable("params", name) for name in ("scale", "bias")}
            given = layer.get_variable("batch_stats", f"{_GIVEN}{call}")
            y, seen = _normalize(layer, x, mask, unbox(params), given)
            layer.put_variable("batch_stats", f"{_SEEN}{call}", seen)
            return y

        statistics = flatten_dict(unfreeze(variables.get("batch_stats", {})))
        for layer, calls in given.items():
            statistics |= {(*layer, f"{_GIVEN}{call}"): seen for call, seen in enumerate(calls)}
        args, kwargs = _call(batch)
        with nn.intercept_methods(interceptor):
            # A model may write to more than its statistics; in training, never to its parameters.
            _, updates = model.apply(
                {**variables, "batch_stats": unflatten_dict(statistics)},
                *args,
                **kwargs,
                **options,
                mutable=DenyList("params"),
            )
        return _by_layer(flatten_dict(unfreeze(updates.get("batch_stats", {}))))

    def with_statistics(statistics: Any) -> Any:
        new = {"batch_stats": statistics}
        if isinstance(variables, FrozenDict):
            return variables.copy(new)
        return {**variables, **new}

    return Model(see, variables, variables.get("batch_stats", {}), with_statistics)


def _nnx(model: Any, variables: Any, apply_kwargs: Mapping[str, Any]) -> Model:
    from flax import nnx

    if not isinstance(variables, nnx.State):
        raise TypeError(
            f"variables of an NNX model must be an nnx.State, such as nnx.state(model), got "
            f"{type(variables).__name__}."
        )
    # All that the model has, for a state that holds a part of it.
    graphdef, everything = (model, variables)
    if isinstance(model, nnx.Module):
        graphdef, everything = nnx.split(model)

    def see(states: Any, given: Network[Seen], batch: Any, everywhere: bool) -> Network[Seen]:
        everything, variables = states
        copy = nnx.merge(graphdef, everything)
        nnx.update(copy, variables)
        layers = {
            path: node for path, node in nnx.iter_graph(copy) if isinstance(node, _nnx_layers())
        }
        for path, layer in layers.items():
            object.__setattr__(layer, "__class__", _watched_class(type(layer)))
            layer.calibrate_everywhere = everywhere
            for call, seen in enumerate(given.get(path, ())):
                setattr(layer, f"{_GIVEN}{call}", nnx.BatchStat(seen))
        args, kwargs = _call(batch)
        copy(*args, **kwargs, **apply_kwargs)
        return _by_layer(
            {
                (*path, name): value.get_value()
                for path, layer in layers.items()
                for name, value in vars(layer).items()
                if name.startswith(_SEEN)
            }
        )

    return Model(see, (everything, variables), variables, lambda statistics: statistics)


def _nnx_layers() -> tuple[type, ...]:
    from flax import nnx

    from jaxbn.nnx import BatchNorm

    return BatchNorm, nnx.BatchNorm


@cache
def _watched_class(of: type) -> type:
    """The class of a layer that is watched, for layers of the class `of`."""
    from flax import nnx

    (base,) = (layer for layer in _nnx_layers() if issubclass(of, layer))

    def __call__(self, *args, **kwargs):
        x, is_frozen, mask = _arguments(*args, **kwargs)
        if is_frozen is None:
            is_frozen = self.use_running_average
        if not self.calibrate_everywhere and is_frozen is not False:
            return base.__call__(self, *args, **kwargs)
        call = _first_free(lambda name: hasattr(self, name))
        given = getattr(self, f"{_GIVEN}{call}", None)
        params = {"scale": self.scale, "bias": self.bias}
        params = {k: None if v is None else v.get_value() for k, v in params.items()}
        # Unlike the other three, this layer promotes the input to its statistics' dtype.
        extra = (self.mean.get_value(),) if base is nnx.BatchNorm else ()
        given = None if given is None else given.get_value()
        y, seen = _normalize(self, x, mask, params, given, *extra)
        setattr(self, f"{_SEEN}{call}", nnx.BatchStat(seen))
        return y

    watched = type(base.__name__, (base,), {"__call__": __call__})
    # Behind a class that inherits, and before what it inherits from: its `super().__call__`.
    return watched if of is base else type(of.__name__, (of, watched), {})


def _arguments(x, use_running_average=None, *, mask=None):
    """The arguments of all four layers."""
    return x, use_running_average, mask


def _call(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments that a batch stands for."""
    if isinstance(batch, tuple):
        return batch, {}
    return ((), batch) if isinstance(batch, Mapping) else ((batch,), {})


def _first_free(is_taken: Callable[[str], bool]) -> int:
    call = 0
    while is_taken(f"{_SEEN}{call}"):
        call += 1
    return call


def _by_layer(values: Mapping[tuple[Any, ...], Any]) -> Network[Seen]:
    """What calls have seen, in order, from a table by path and name."""
    calls: dict[Layer, dict[int, Seen]] = {}
    for (*layer, name), seen in values.items():
        if str(name).startswith(_SEEN):
            calls.setdefault(tuple(layer), {})[int(name.removeprefix(_SEEN))] = seen
    return {layer: tuple(seen[i] for i in sorted(seen)) for layer, seen in calls.items()}


def _normalize(
    layer: Any,
    x: jax.Array,
    mask: jax.Array | None,
    params: Mapping[str, jax.Array | None],
    given: Seen | None,
    *promoting: jax.Array,
) -> tuple[jax.Array, Seen]:
    """The layer's output, normalized by the moments it is given or else by its own; and its own."""
    from flax.linen.dtypes import canonicalize_dtype

    x = _checks.floating_array("x", x)
    feature_axes = _checks.feature_axes(layer.axis, x.shape)
    mask = _checks.mask(mask, x.shape)
    own_params = {name: leaf for name, leaf in params.items() if leaf is not None}
    wide = x.astype(statistics_dtype(x.dtype))
    reduced_axes = tuple(a for a in range(x.ndim) if a not in feature_axes)
    own = moments(wide, x, mask, reduced_axes)
    features = own.mean.shape
    own = Moments(*(jnp.broadcast_to(value, features) for value in own))
    batch = own
    if given is not None:
        whole = (jnp.asarray(value, wide.dtype).reshape(features) for value in given[:4])
        whole = Moments(*whole)
        batch = Moments(*(jnp.where(whole.n > 0, a, b) for a, b in zip(whole, own, strict=True)))

    # A state whose mean is a single number would lose what is beyond its last digit.
    centred = (wide - batch.shift) - batch.mean
    var = variance(batch, getattr(layer, "batch_variance", "biased"))
    y, _ = batch_norm(
        own_params,
        {"mean": jnp.zeros_like(var), "var": var},
        centred,
        False,
        axis=layer.axis,
        epsilon=layer.epsilon,
        mask=mask,
        dtype=canonicalize_dtype(x, *own_params.values(), *promoting, dtype=layer.dtype),
    )
    leaf = tuple(x.shape[a] for a in feature_axes)
    ddof = int(getattr(layer, "running_variance", "biased") == "unbiased")
    return y, Seen(*(value.reshape(leaf) for value in own), ddof=jnp.asarray(ddof, jnp.int32))
