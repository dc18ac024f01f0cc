"""HarmoniCa: learned feature caching for Diffusion Transformers (ICML 2025, arXiv 2410.01723).

The method alone, without Ray or MLflow: a transformer seen as a list of residual branches
(`harmonica.models`), three passes over that list (`passes`), a router that says which branches
may reuse their last value (`router`, `plan`), and its training (`sdt`, `iepo`).

`harmonica.apply(pipe.transformer, router)` and `harmonica.remove(pipe.transformer)` put a trained plan on
a diffusers pipeline and take it off.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harmonica.attach import apply, remove

__version__ = "0.1.0"
__all__ = ["apply", "remove"]


def __getattr__(name: str) -> Any:
    """`apply` and `remove` when they are first asked for: they need torch, which takes seconds to import."""
    if name in __all__:
        from harmonica import attach

        return getattr(attach, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
