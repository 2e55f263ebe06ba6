"""Choose the keyword arguments that tell a Flax model whether it trains."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_TRAIN = ("train", "training", "is_training")
_NOT_TRAIN = ("deterministic", "use_running_average")


class CallOptions(NamedTuple):
    """The keyword arguments of a call in evaluation and in training, or None where not given."""

    evaluation: Mapping[str, Any] | None
    training: Mapping[str, Any] | None

    def of(self, call: Callable[..., Any], train: bool) -> dict[str, Any]:
        """Return those of one call. By default, they are the usual names that `call` has."""
        given = self.training if train else self.evaluation
        if given is not None:
            return dict(given)
        parameters = inspect.signature(call).parameters
        return {name: train for name in _TRAIN if name in parameters} | {
            name: not train for name in _NOT_TRAIN if name in parameters
        }
