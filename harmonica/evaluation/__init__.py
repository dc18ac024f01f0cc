"""Metrics of images, against the uncached ones and against real ones, and pictures of them."""
