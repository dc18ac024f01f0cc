"""The built-in models are trained here on Ray: an example that needs a clone, not part of the wheel."""
