"""Explain why two layers differ.

`fits` and `epsilon` find the convention that explains each layer's recording. `convention`,
`faults` and `precision` look for reasons in it, and `diagnose` combines them.
"""
