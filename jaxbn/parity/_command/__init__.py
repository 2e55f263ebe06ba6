"""Measure the batch norms of all installed frameworks, and show the results."""
