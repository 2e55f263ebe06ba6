"""Define what the parity tools ask of a network: its calls, a run, its batch norms, its dtype."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from jaxbn.parity._cotangent import COTANGENT_SEED
from jaxbn.parity._layer import DifferentiableLayer
from jaxbn.parity._networks.layers import Facts

# The parentheses distinguish them from the names of submodules.
INPUT, OUTPUT = "(input)", "(output)"

MeanAndVar = tuple[np.ndarray, np.ndarray]
# The running mean and variance of each submodule that keeps them, by its name.
StatisticsByName = dict[str, MeanAndVar]


class Call(NamedTuple):
    """A call of a submodule.

    Attributes:
      name: the submodule's name in its framework.
      layer: its kind and shape, or None if it has no parameters and statistics of its own.
      source: the name of the layer whose output it takes unchanged, if there is one.
      transformed: whether it is inside `nn.scan`, `nnx.remat` or another transformation, so that
        its output cannot be recorded.
    """

    name: str
    layer: Facts | None
    source: str | None
    transformed: bool


class Run(NamedTuple):
    """One forward and backward pass, in Flax's layout. All keys are the network's own names.

    Attributes:
      values: the intermediates and the output.
      gradients: the gradients with respect to the intermediates and the input.
      statistics: the running statistics after the pass.
      norm_inputs: what arrived at the batch norms among the intermediates, of shape (rows, C).
      dropouts: the dropouts that were active.
    """

    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    statistics: StatisticsByName
    norm_inputs: dict[str, np.ndarray]
    dropouts: list[str]


class Network(Protocol):
    """A network of any framework.

    Attributes:
      label: what messages call it: "PyTorch" or, if both networks are of one framework, "the
        reference".
    """

    label: str

    def check_dtype(self, x: np.ndarray) -> None:
        """Raise if the network cannot take an input of this dtype."""
        ...

    def calls(self, x: np.ndarray, train: bool) -> list[Call]:
        """Return the calls of submodules in a forward pass, in their order."""
        ...

    def run(self, names: Sequence[str], x: np.ndarray, train: bool) -> Run:
        """Run forward and backward, and record the submodules with these names."""
        ...

    def batch_norm(self, name: str) -> DifferentiableLayer | None:
        """Return a batch norm for `compare`, or None if the submodule is something else.

        Call it after `run`.
        """
        ...

    def astype(self, dtype: str) -> Self:
        """Return a network whose parameters and statistics have this floating dtype."""
        ...


def cotangent_of(shape: Sequence[int]) -> np.ndarray:
    """Return the cotangent of an output in Flax's layout, the same for all networks."""
    return np.random.default_rng(COTANGENT_SEED).normal(size=shape)


def require_array(label: str, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(
            f"only single arrays can be compared; in {label}, {name} returns a "
            f"{type(value).__name__}."
        )


def require_one_call(label: str, names: Collection[str], calls: Sequence[str]) -> None:
    times: Mapping[str, int] = Counter(calls)
    wrong = {name: times.get(name, 0) for name in names if times.get(name, 0) != 1}
    if wrong:
        raise ValueError(
            f"each name must be called exactly once; calls in {label}: {wrong}. These are "
            f"called once: {sorted(k for k, n in times.items() if k and n == 1)}."
        )
