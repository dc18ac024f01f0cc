"""HarmoniCa: learned feature caching for Diffusion Transformers (ICML 2025, arXiv 2410.01723).

The method alone, without Ray or MLflow: a transformer is seen as a list of residual branches
(`harmonica.models`). Three passes walk that list: the full one (`BranchedTransformer.forward`), and the soft
and the planned one of `core.passes`. A router says which branches may reuse their last value (`core.router`,
`core.plan`). It is trained by SDT with the IEPO objective (`training.sdt`, `training.iepo`), or its plan is
searched (`training.plans.search`).

`harmonica.apply(pipe, router)` and `harmonica.remove(pipe)` put a trained plan on a diffusers pipeline and
take it off; `harmonica.train_pipeline(pipe, prompts)` trains one for any pipeline with a transformer.
"""

from typing import TYPE_CHECKING, Any

from harmonica.version import __version__ as __version__

if TYPE_CHECKING:
    from harmonica.integrations.diffusers_pipeline import apply, remove
    from harmonica.pipeline_training.train import train_pipeline

__all__ = ["apply", "remove", "train_pipeline"]


def __getattr__(name: str) -> Any:
    """Import a function when it is first asked for: they need torch, which takes seconds to import."""
    if name == "train_pipeline":
        from harmonica.pipeline_training import train

        return train.train_pipeline
    if name in __all__:
        from harmonica.integrations import diffusers_pipeline

        return getattr(diffusers_pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
