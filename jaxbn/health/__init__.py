"""Say what is wrong with the batch norms of a model."""
