"""Modules that the examples share: options, data, checkpoints, the training run, errors."""
