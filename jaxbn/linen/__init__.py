"""Batch norm for models of Flax Linen, and other options for the batch norms that a model has."""

from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
from jaxbn.linen._batch_renorm import BatchRenorm as BatchRenorm
from jaxbn.linen._override import override as override

__all__ = ["BatchNorm", "BatchRenorm", "override"]
