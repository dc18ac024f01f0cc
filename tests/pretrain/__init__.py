"""The training of the built-in models."""
