"""HarmoniCa: learned feature caching for Diffusion Transformers (ICML 2025, arXiv 2410.01723).

The method alone, without Ray or MLflow: a transformer is seen as a list of residual branches
(`harmonica.models`). Three passes walk that list: the full one (`BranchedTransformer.forward`), and the soft
and the planned one of `core.passes`. A router says which branches may reuse their last value (`core.router`,
`core.plan`). It is trained by SDT with the IEPO objective (`training.sdt`, `training.iepo`), or its plan is
searched (`training.plans.search`).

`harmonica.apply(pipe.transformer, router)` and `harmonica.remove(pipe.transformer)` put a trained plan on
a diffusers pipeline and take it off.
"""

from typing import TYPE_CHECKING, Any

from harmonica.version import __version__ as __version__

if TYPE_CHECKING:
    from harmonica.integrations.diffusers_pipeline import apply, remove

__all__ = ["apply", "remove"]


def __getattr__(name: str) -> Any:
    """`apply` and `remove` when they are first asked for: they need torch, which takes seconds to import."""
    if name in __all__:
        from harmonica.integrations import diffusers_pipeline

        return getattr(diffusers_pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
