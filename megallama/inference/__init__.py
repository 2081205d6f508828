"""Text from a model on the training ranks."""
