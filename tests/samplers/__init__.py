"""Samplers against diffusers and against the formulas written out."""
