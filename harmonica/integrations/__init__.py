"""Cached passes inside an unmodified diffusers pipeline: `harmonica.apply` and `harmonica.remove`."""
