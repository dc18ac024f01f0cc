"""The stage `evaluate` measures image error, quality and latency on Ray."""
