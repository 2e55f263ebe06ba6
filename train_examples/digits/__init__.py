"""A convolutional network with batch normalization that learns handwritten digits."""
