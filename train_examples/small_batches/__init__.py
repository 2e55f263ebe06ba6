"""Batch norm, ghost batches and batch renormalization with few images in a batch."""
