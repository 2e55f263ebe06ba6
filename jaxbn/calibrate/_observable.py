"""A Flax model, Linen or NNX, as a function that observes the inputs of its batch norms."""

from collections.abc import Mapping
from typing import Any

from jaxbn.calibrate._observe import ObservableModel


def observable(model: Any, variables: Any, apply_kwargs: Mapping[str, Any]) -> ObservableModel:
    """Return `model`, which is not changed, as a function of its variables and a batch.

    Args:
      model: a `flax.linen.Module`, a `flax.nnx.Module` or a `flax.nnx.GraphDef`.
      variables: the variables of a Linen model, or an `nnx.State`.
      apply_kwargs: further keyword arguments of each call of the model.
    """
    import flax.linen as nn
    from flax import nnx

    from jaxbn.calibrate._observe_linen import observable_linen
    from jaxbn.calibrate._observe_nnx import observable_nnx

    if isinstance(model, nn.Module):
        return observable_linen(model, variables, apply_kwargs)
    if isinstance(model, nnx.Module | nnx.GraphDef):
        return observable_nnx(model, variables, apply_kwargs)
    raise TypeError(
        f"model must be a flax.linen.Module, a flax.nnx.Module or a flax.nnx.GraphDef, got "
        f"{type(model).__name__}."
    )
