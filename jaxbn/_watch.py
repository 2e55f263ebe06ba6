"""Run a Flax model, Linen or NNX, with given statistics, and observe its batch norms."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from inspect import unwrap
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbn import _call_checks, _layers
from jaxbn._batch_norm import batch_norm
from jaxbn._batches import arguments
from jaxbn._moments import Moments, moments, statistics_dtype
from jaxbn._pooling import Layer
from jaxbn._running import variance

# Prefixes of variables beside `mean` and `var`; the number of the layer's call follows. They live
# with the statistics, so that lifted transforms, such as `scan` over layers, treat them alike.
_GIVEN, _OBSERVED = "calibrate_given_", "calibrate_observed_"


class Observed(NamedTuple):
    """The moments of the input of one call of a layer, each of the shape of the layer's `mean`.

    Attributes:
      n, mean_high, mean_low, var: as in `Moments`.
      ddof: 1 where the layer tracks the unbiased variance, which divides by `n - 1`, and otherwise
        0. A scalar for each layer, so layers in a `scan` have an array of them.
    """

    n: Any
    mean_high: Any
    mean_low: Any
    var: Any
    ddof: Any


C = TypeVar("C")
# A value for each call of each layer.
Network = dict[Layer, tuple[C, ...]]


class Model(NamedTuple):
    """A model as a function, and where its statistics are.

    Attributes:
      observe: maps variables, moments given to calls, a batch, and whether to observe layers in
        evaluation mode too, to what each call has observed.
      variables: the first argument of `observe`.
      statistics: the part of the caller's variables that holds the running statistics, a tree.
      with_statistics: returns the caller's variables with another such part.
    """

    observe: Callable[..., Network[Observed]]
    variables: Any
    statistics: Any
    with_statistics: Callable[[Any], Any]


def as_function(model: Any, variables: Any, apply_kwargs: Mapping[str, Any]) -> Model:
    """Return `model`, which is not changed, as a function of its variables."""
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
    from flax.linen.dtypes import canonicalize_dtype
    from flax.traverse_util import flatten_dict, unflatten_dict

    from jaxbn.linen import BatchNorm

    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables of a flax.linen.Module must be a mapping of collections, got "
            f"{type(variables).__name__}."
        )
    bodies = [unwrap(layer.__call__) for layer in (BatchNorm, nn.BatchNorm)]
    options = {name: value for name, value in apply_kwargs.items() if name != "mutable"}

    def observe(
        variables: Any, given: Network[Observed], batch: Any, everywhere: bool
    ) -> Network[Observed]:
        def interceptor(next_fun, args, kwargs, context):
            # Of a layer that inherits, the call to the layer it inherits from.
            if unwrap(context.orig_method.func) not in bodies:
                return next_fun(*args, **kwargs)
            layer, (x, is_frozen, mask) = context.module, _arguments(*args, **kwargs)
            if is_frozen is None:
                is_frozen = layer.use_running_average
            if not (everywhere or _trains(is_frozen)):
                return next_fun(*args, **kwargs)

            call = _first_free(lambda name: layer.has_variable("batch_stats", name))
            params = unbox({k: layer.get_variable("params", k) for k in ("scale", "bias")})
            dtype = canonicalize_dtype(x, *params.values(), dtype=layer.dtype)
            x = _layers.floating_input(x, layer.dtype)
            given = layer.get_variable("batch_stats", f"{_GIVEN}{call}")
            y, observed = _normalize(layer, x, mask, params, given, dtype)
            layer.put_variable("batch_stats", f"{_OBSERVED}{call}", observed)
            return y

        statistics = flatten_dict(unfreeze(variables.get("batch_stats", {})))
        for layer, calls in given.items():
            statistics |= {(*layer, f"{_GIVEN}{i}"): whole for i, whole in enumerate(calls)}
        args, kwargs = arguments(batch)
        with _explained(), nn.intercept_methods(interceptor):
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

    return Model(observe, variables, variables.get("batch_stats", {}), with_statistics)


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

    def observe(
        states: Any, given: Network[Observed], batch: Any, everywhere: bool
    ) -> Network[Observed]:
        everything, variables = states
        copy = nnx.merge(graphdef, everything)
        nnx.update(copy, variables)
        layers = {
            path: node for path, node in nnx.iter_graph(copy) if isinstance(node, _nnx_layers())
        }
        for path, layer in layers.items():
            object.__setattr__(layer, "__class__", _watched_class(type(layer)))
            layer.calibrate_everywhere = everywhere
            for i, whole in enumerate(given.get(path, ())):
                setattr(layer, f"{_GIVEN}{i}", nnx.BatchStat(whole))
        args, kwargs = arguments(batch)
        with _explained():
            copy(*args, **kwargs, **apply_kwargs)
        return _by_layer(
            {
                (*path, name): value.get_value()
                for path, layer in layers.items()
                for name, value in vars(layer).items()
                if name.startswith(_OBSERVED)
            }
        )

    return Model(observe, (everything, variables), variables, lambda statistics: statistics)


def _nnx_layers() -> tuple[type, ...]:
    from flax import nnx

    from jaxbn.nnx import BatchNorm

    return BatchNorm, nnx.BatchNorm


@cache
def _watched_class(of: type) -> type:
    """Return the class that layers of the class `of` have while they are observed."""
    from flax import nnx

    from jaxbn.nnx import promoted

    (base,) = (layer for layer in _nnx_layers() if issubclass(of, layer))

    def __call__(self, *args, **kwargs):
        x, is_frozen, mask = _arguments(*args, **kwargs)
        if is_frozen is None:
            is_frozen = self.use_running_average
        if not (self.calibrate_everywhere or _trains(is_frozen)):
            return base.__call__(self, *args, **kwargs)
        call = _first_free(lambda name: hasattr(self, name))
        given = getattr(self, f"{_GIVEN}{call}", None)
        variables = (self.mean, self.var, self.scale, self.bias)
        values = (None if v is None else v.get_value() for v in variables)
        (x, _, _, scale, bias), dtype = promoted(self, x, *values)
        given = None if given is None else given.get_value()
        params = {"scale": scale, "bias": bias}
        y, observed = _normalize(self, x, mask, params, given, dtype)
        setattr(self, f"{_OBSERVED}{call}", nnx.BatchStat(observed))
        return y

    watched = type(base.__name__, (base,), {"__call__": __call__})
    # Behind a class that inherits, and before what it inherits from: its `super().__call__`.
    return watched if of is base else type(of.__name__, (of, watched), {})


def _arguments(x, use_running_average=None, *, mask=None):
    """Return the arguments of a call, of which all four layers have the same."""
    return x, use_running_average, mask


def _trains(is_frozen: Any) -> bool:
    # Neither None nor a traced value: the layer itself says what is wrong with those.
    return isinstance(is_frozen, bool | np.bool_) and not is_frozen


@contextmanager
def _explained() -> Iterator[None]:
    """Explain the errors of transforms that do not take on the variables of observed calls."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if _OBSERVED in str(error) or "broadcasted variable has a data dependency" in str(error):
            raise ValueError(
                "model calls a batch norm inside a loop, branch or map that carries or shares its "
                "statistics, such as nn.scan with variable_carry='batch_stats', nn.cond or "
                "nnx.fori_loop, where its calls cannot be told apart. Calibrate a model that has "
                "the same variables and is written with Python's for and if there."
            ) from error
        raise


def _first_free(is_taken: Callable[[str], bool]) -> int:
    call = 0
    while is_taken(f"{_OBSERVED}{call}"):
        call += 1
    return call


def _by_layer(values: Mapping[tuple[Any, ...], Any]) -> Network[Observed]:
    """Group a table by path and name by layer, with the calls of each in order."""
    calls: dict[Layer, dict[int, Observed]] = {}
    for (*layer, name), observed in values.items():
        if str(name).startswith(_OBSERVED):
            calls.setdefault(tuple(layer), {})[int(name.removeprefix(_OBSERVED))] = observed
    return {layer: tuple(by_call[i] for i in sorted(by_call)) for layer, by_call in calls.items()}


def _normalize(
    layer: Any,
    x: jax.Array,
    mask: jax.Array | None,
    params: Mapping[str, jax.Array | None],
    given: Observed | None,
    dtype: DTypeLike,
) -> tuple[jax.Array, Observed]:
    """Return the layer's output, normalized by `given` or else by its own moments, and those."""
    feature_axes = _call_checks.feature_axes(layer.axis, x.shape)
    mask = _call_checks.mask(_layers.boolean_mask(mask), x.shape)
    own_params = {name: leaf for name, leaf in params.items() if leaf is not None}
    wide = x.astype(statistics_dtype(x.dtype))
    reduced_axes = tuple(a for a in range(x.ndim) if a not in feature_axes)
    own = moments(wide, mask, None, x.dtype, reduced_axes)
    features = own.mean.shape
    own = Moments(*(jnp.broadcast_to(value, features) for value in own))
    batch = own
    if given is not None:
        whole = (jnp.asarray(value, wide.dtype).reshape(features) for value in given[:4])
        whole = Moments(*whole)
        batch = Moments(*(jnp.where(whole.n > 0, a, b) for a, b in zip(whole, own, strict=True)))

    # A state whose mean is a single number would lose what is beyond its last digit.
    centred = (wide - batch.mean_high) - batch.mean_low
    var = variance(batch, getattr(layer, "batch_variance", "biased"))
    y, _ = batch_norm(
        own_params,
        {"mean": jnp.zeros_like(var), "var": var},
        centred,
        False,
        axis=layer.axis,
        epsilon=layer.epsilon,
        mask=mask,
        dtype=dtype,
    )
    leaf = tuple(x.shape[a] for a in feature_axes)
    ddof = int(getattr(layer, "running_variance", "biased") == "unbiased")
    return y, Observed(*(value.reshape(leaf) for value in own), ddof=jnp.asarray(ddof, jnp.int32))
