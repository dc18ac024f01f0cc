"""A package, or `python -m tests.benchmarks` would find the `tests` that torch-fidelity installs."""
