"""Architectures, their files on disk and in stores, and what conditions them."""
