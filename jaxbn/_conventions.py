"""The presets: the conventions of frameworks, as keyword arguments of `batch_norm`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, cast

from jaxbn._running import Estimator


class Keywords(TypedDict):
    """The type of a preset, from which a type checker knows the arguments in `**preset`."""

    momentum: float
    epsilon: float
    batch_variance: Estimator
    running_variance: Estimator


# `Mapping` compares with any other mapping; the dataclass must not replace that comparison.
@dataclass(frozen=True, eq=False)
class Convention(Mapping[str, Any]):
    """An immutable, hashable mapping of keyword arguments of `batch_norm`."""

    momentum: float
    epsilon: float
    batch_variance: Estimator
    running_variance: Estimator

    def __getitem__(self, name: str) -> Any:
        return asdict(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(asdict(self))

    def __len__(self) -> int:
        return len(asdict(self))

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other} if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self} if isinstance(other, Mapping) else NotImplemented


def _preset(momentum: float, epsilon: float, batch: Estimator, running: Estimator) -> Keywords:
    return cast(Keywords, Convention(momentum, epsilon, batch, running))


#: PyTorch's convention, and the defaults of the function `batch_norm`. PyTorch writes the momentum
#: as 0.1, the weight of the new value.
PYTORCH = _preset(0.9, 1e-5, "biased", "unbiased")
#: Flax's convention, and the defaults of `jaxbn.linen.BatchNorm` and `jaxbn.nnx.BatchNorm`.
FLAX = _preset(0.99, 1e-5, "biased", "biased")
#: The convention of `keras.layers.BatchNormalization`.
KERAS = _preset(0.99, 1e-3, "biased", "biased")
#: The convention of the exercise that the project grew from.
EXERCISE = _preset(0.9, 1e-5, "unbiased", "unbiased")
