"""The losses and the training step."""
