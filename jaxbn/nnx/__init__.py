"""Batch norm for models of Flax NNX, and other options for the batch norms that a model has."""

from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
from jaxbn.nnx._batch_renorm import BatchRenorm as BatchRenorm
from jaxbn.nnx._override import override as override

__all__ = ["BatchNorm", "BatchRenorm", "override"]
