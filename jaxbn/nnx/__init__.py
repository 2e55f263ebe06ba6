"""Batch norm for Flax NNX, and a function that changes the options of existing layers."""

from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
from jaxbn.nnx._batch_renorm import BatchRenorm as BatchRenorm
from jaxbn.nnx._override import override as override

__all__ = ["BatchNorm", "BatchRenorm", "override"]
