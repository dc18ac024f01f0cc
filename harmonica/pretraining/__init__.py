"""Training of the built-in models: an example that needs a clone, not part of the installed package."""
