"""How good images are: each beside its uncached twin, and as a set."""
