"""The digits network, trained step by step in PyTorch and in JAX, and compared after each step."""
