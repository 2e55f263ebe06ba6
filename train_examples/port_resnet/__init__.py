"""A ResNet-18 that is converted from PyTorch to Flax, compared, folded and exported."""
