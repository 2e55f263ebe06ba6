"""The parts of `python -m jaxbn.health`."""
