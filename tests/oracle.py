"""Batch norm in extended precision: the one that `python -m jaxbn.parity` compares with, too."""

from jaxbn.parity._oracle import Result, batch_norm, error

__all__ = ["Result", "batch_norm", "error"]
