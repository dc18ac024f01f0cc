"""What speed by design is worth here: `python -m tests.benchmarks`."""
