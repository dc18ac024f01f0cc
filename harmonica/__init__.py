"""HarmoniCa: learned feature caching for Diffusion Transformers (ICML 2025, arXiv 2410.01723).

The method alone, without Ray or MLflow: a transformer seen as a list of residual branches
(`harmonica.models`), three passes over that list (`passes`), a router that says which branches
may reuse their last value (`router`, `plan`), and its training (`sdt`, `iepo`).
"""

__version__ = "0.1.0"
