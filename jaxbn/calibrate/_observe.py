"""The parts that Linen and NNX models share when their batch norms are observed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxbn.calibrate._called_layers import CalledLayers
from jaxbn.calibrate._statistics import LayerPath

T = TypeVar("T")
# A value for each call of each layer, in the order of the calls.
PerCall = dict[LayerPath, tuple[T, ...]]

# Prefixes of the variables next to `mean` and `var`; the number of the layer's call follows. They
# are in the collection of the statistics, so that lifted transforms, such as `scan` over layers,
# treat them alike.
PRESCRIBED, OBSERVED = "calibrate_prescribed_", "calibrate_observed_"


class CallMoments(NamedTuple):
    """The moments of the input of one call, each in the shape of the layer's `mean`.

    Attributes:
      n, mean_high, mean_low, var: as in `Moments`.
      ddof: as in `Statistics`.
    """

    n: Any
    mean_high: Any
    mean_low: Any
    var: Any
    ddof: Any


class Observation(NamedTuple):
    """What one run of a model yields.

    Attributes:
      calls: the moments of the input of each call of a batch norm.
      output: the output of the model.
    """

    calls: PerCall[CallMoments]
    output: Any


class ObservableModel(NamedTuple):
    """A model as a pure function, and the place of its running statistics.

    Attributes:
      observe: takes variables, prescribed moments (`PerCall[CallMoments]`), a batch and a bool;
        returns an `Observation`. A call with prescribed moments of at least one value normalizes
        with those, and any other call with the moments of its own input. The bool says whether to
        observe all calls, or only those in training mode; others normalize with the running
        statistics.
      variables: the first argument of `observe`.
      statistics: the part of the caller's variables that holds the running statistics, a tree.
      replace_statistics: takes such a tree, and returns the caller's variables with it.
      called: the layers that have been called so far. Each trace of `observe` adds to them.
    """

    observe: Callable[[Any, PerCall[CallMoments], Any, bool], Observation]
    variables: Any
    statistics: Any
    replace_statistics: Callable[[Any], Any]
    called: CalledLayers


def call_arguments(x, use_running_average=None, *, mask=None):
    """Return the arguments of a call. The signature is that of all four layers."""
    return x, use_running_average, mask


def is_observed(layer: Any, use_running_average: Any, every_call: bool) -> bool:
    """Return whether to observe a call that was made with this `use_running_average`."""
    # Flax's layers cannot be frozen.
    if getattr(layer, "frozen", False):
        return False
    if use_running_average is None:
        use_running_average = layer.use_running_average
    # If it is None or traced, the layer itself is called, and raises its error.
    is_valid = isinstance(use_running_average, bool | np.bool_)
    return every_call or (is_valid and not use_running_average)


def next_call(has_variable: Callable[[str], bool]) -> int:
    """Return the number of the layer's calls so far."""
    call = 0
    while has_variable(f"{OBSERVED}{call}"):
        call += 1
    return call


def by_layer(variables: Mapping[tuple[Any, ...], Any]) -> PerCall[CallMoments]:
    """Select the observed moments among variables, whose keys are paths that end in the name."""
    calls: dict[LayerPath, dict[int, CallMoments]] = {}
    for (*layer, name), observed in variables.items():
        if str(name).startswith(OBSERVED):
            calls.setdefault(tuple(layer), {})[int(name.removeprefix(OBSERVED))] = observed
    return {layer: tuple(by_call[i] for i in sorted(by_call)) for layer, by_call in calls.items()}


@contextmanager
def observing(called: CalledLayers, every_call: bool) -> Iterator[None]:
    """Record the layers that are called, and explain errors of transforms.

    Some transforms cannot carry the variables of observed calls.
    """
    try:
        with called.observing(every_call):
            yield
    except (TypeError, ValueError) as error:
        if OBSERVED in str(error) or "broadcasted variable has a data dependency" in str(error):
            raise ValueError(
                "model calls a batch norm inside a loop, branch or map that carries or shares its "
                "statistics, such as nn.scan with variable_carry='batch_stats', nn.cond or "
                "nnx.fori_loop, where its calls cannot be distinguished. Calibrate a model that "
                "has the same variables and uses Python's for and if there."
            ) from error
        raise
