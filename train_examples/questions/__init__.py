"""Six questions about batch normalization, each answered by an experiment on the digits."""
