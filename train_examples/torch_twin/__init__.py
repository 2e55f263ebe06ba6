"""The digits network in PyTorch and in JAX, trained in lockstep: how far apart they go."""
