"""The loop and the model families."""
