"""A network that hears pitch, ported from PyTorch to NNX with its weights."""
