"""Batch norm for Flax Linen, and a function that changes the options of existing layers."""

from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
from jaxbn.linen._batch_renorm import BatchRenorm as BatchRenorm
from jaxbn.linen._override import override as override

__all__ = ["BatchNorm", "BatchRenorm", "override"]
