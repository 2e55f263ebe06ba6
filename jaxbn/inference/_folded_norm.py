"""Replace a folded batch norm in an NNX model."""

from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike


class FoldedNorm(nnx.Module):
    """Return the input, which is already normalized, in the dtype of the batch norm's output.

    Attributes:
      dtype: the dtype of the output.
      use_running_average: must be True in a call; `model.train()` sets it to False, and
        `model.eval()` to True.
    """

    dtype: Any
    use_running_average: bool

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        if not (self.use_running_average if use_running_average is None else use_running_average):
            raise ValueError(
                "use_running_average must be True in a model whose batch norms are folded, which is"
                " for evaluation only: call model.eval(), or train the model that was folded."
            )
        if mask is not None:
            raise ValueError("mask must be None for a folded batch norm: it is part of its layer.")
        return x.astype(self.dtype)

    def set_view(
        self,
        use_running_average: bool | None = None,
        frozen: bool | None = None,
        track: bool | None = None,
    ) -> None:
        """Set `use_running_average`, as `nnx.view` does. The others have no effect."""
        if use_running_average is not None:
            self.use_running_average = use_running_average


def replace(norm: Any, dtype: Any) -> None:
    """Turn a batch norm into a `FoldedNorm`, wherever a model holds it."""
    for name in [name for name in vars(norm) if not name.startswith("_")]:
        delattr(norm, name)
    object.__setattr__(norm, "__class__", FoldedNorm)
    norm.dtype, norm.use_running_average = dtype, True
