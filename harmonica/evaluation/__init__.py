"""Measure and plot images: against uncached samples and against real images."""
