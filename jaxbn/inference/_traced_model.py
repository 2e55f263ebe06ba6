"""What tracing a model tells about its layers and batch norms."""

from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _call_checks
from jaxbn.inference._program import Program
from jaxbn.inference._tags import Path, as_text


class LayerFacts(NamedTuple):
    """What is known about a layer with a kernel that was called.

    Attributes:
      kind: the class of Flax that the layer is of, or derived from, or "" for other layers.
      kernel_axis: the output axis of the kernel.
      kernel_shape: the shape of the kernel in the call.
      problem: why nothing can be folded into the layer, or None.
    """

    kind: str
    kernel_axis: int
    kernel_shape: tuple[int, ...]
    problem: str | None = None


class NormFacts(NamedTuple):
    """What is known about a batch norm that was called.

    Attributes:
      shape: the shape of its input in the call.
      epsilon: its epsilon.
      dtype: the dtype of its output.
      problem: why it cannot be folded into any layer, or None.
    """

    shape: tuple[int, ...]
    epsilon: float
    dtype: DTypeLike
    problem: str | None = None


class TracedModel(NamedTuple):
    """A model that was traced in evaluation mode.

    Attributes:
      program: the model as a function of the leaves of its variables and its arguments.
      variables, arrays: the leaves of its variables and its arguments.
      layers: the layers with kernels that it calls, by path.
      norms: the batch norms that it calls, by path.
      parameters: for the path of each layer, the numbers of its kernel and its bias, if it has
        one, among the program's inputs.
    """

    program: Program
    variables: list[Any]
    arrays: list[Any]
    layers: dict[Path, LayerFacts]
    norms: dict[Path, NormFacts]
    parameters: dict[Path, dict[str, int]]


# Whether a layer of another class reads a bias that is added to it is not known.
NO_BIAS = "it has no bias, and is not a layer of Flax"
_FLAX_LAYERS = (
    *("Conv", "ConvLocal", "ConvTranspose"),
    *("Dense", "DenseGeneral", "Einsum", "Linear", "LinearGeneral"),
)


def layer_facts(layer: Any, kernel: Any, stored_shape: Any) -> LayerFacts:
    """Return the facts about a layer with a kernel.

    Args:
      layer: the layer, of Flax or of a user.
      kernel: its kernel in the call.
      stored_shape: the shape of its kernel among the model's variables, or None.
    """
    of_flax = [c for c in type(layer).__mro__ if c.__module__.startswith("flax.")]
    names = [c.__name__ for c in of_flax if c.__name__ in _FLAX_LAYERS]
    shape = np.shape(kernel)
    problem = None
    if shape != stored_shape:
        problem = (
            f"its kernel has the shape {shape} in the call and {stored_shape or 'none'} among the "
            f"variables, as inside nn.scan or nn.vmap"
        )
    axis = -2 if getattr(layer, "transpose_kernel", False) else -1
    return LayerFacts(names[0] if names else "", axis, shape, problem)


def norm_facts(layer: Any, path: Path, x: ArrayLike, mask: Any, dtype: DTypeLike) -> NormFacts:
    """Return the facts about a batch norm that is called with `x` and `mask`."""
    shape = np.shape(x)
    problem = None
    if mask is not None:
        problem = f"{as_text(path)} is called with a mask"
    elif _call_checks.feature_axes(layer.axis, shape) != (len(shape) - 1,):
        problem = (
            f"{as_text(path)} has its features on axis={layer.axis!r} of an input with {len(shape)}"
            f" axes, and a layer has its features on the last"
        )
    return NormFacts(shape, layer.epsilon, dtype, problem)


def check_evaluation(path: Path, is_training: bool, how: str) -> None:
    """Reject a batch norm in training mode."""
    if is_training:
        raise ValueError(
            f"{as_text(path)} normalizes with the statistics of the batch, and folding is for "
            f"evaluation: {how}."
        )
