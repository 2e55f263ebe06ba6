"""A ResNet-18 of PyTorch's, converted to Flax, compared, folded and exported."""
