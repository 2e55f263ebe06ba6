"""EfficientNet-Lite0 with its ImageNet weights, ported from PyTorch to Flax."""
