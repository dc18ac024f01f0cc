"""The stage `evaluate`: image error, quality and latency of a router on Ray."""
