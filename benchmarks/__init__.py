"""Measurements of what batch norm costs. Run them with `python -m benchmarks`."""
