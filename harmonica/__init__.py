"""Learn feature caching for Diffusion Transformers by HarmoniCa.

HarmoniCa is from ICML 2025, arXiv 2410.01723. This package has the method alone, without Ray or MLflow.

`harmonica.apply(pipe, router)` and `harmonica.remove(pipe)` put a trained plan on a diffusers pipeline and
take it off; `harmonica.train_pipeline(pipe, prompts)` trains one for any pipeline with a transformer, and
`harmonica.EvenSteps` is a plan without training. The names in `__all__` are the public interface; modules may
move.

A transformer is seen as a list of residual branches (`harmonica.models`). Three passes walk that list: the
full one (`BranchedTransformer.forward`), and the soft and the planned one of `core.passes`. A router says
which branches may reuse their last value (`core.router`, `core.plan`). It is trained by SDT with the IEPO
objective (`training.sdt`, `training.iepo`), or the steps that it reuses are learned with their forecasts
(`training.plans.search`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from harmonica.version import __version__ as __version__

if TYPE_CHECKING:
    from harmonica.core.artifact import RouterArtifact
    from harmonica.core.sampling import sample
    from harmonica.integrations.diffusers_pipeline import apply, remove
    from harmonica.integrations.recorded.even_steps import EvenSteps
    from harmonica.models.loading import ModelConfig, load_model
    from harmonica.pipeline_training.train import train_pipeline
    from harmonica.samplers import SamplerConfig, make_sampler
    from harmonica.training.presets import learned_steps

__all__ = [
    "EvenSteps",
    "ModelConfig",
    "RouterArtifact",
    "SamplerConfig",
    "apply",
    "learned_steps",
    "load_model",
    "make_sampler",
    "remove",
    "sample",
    "train_pipeline",
]

_HOMES = {
    "EvenSteps": "harmonica.integrations.recorded.even_steps",
    "ModelConfig": "harmonica.models.loading",
    "RouterArtifact": "harmonica.core.artifact",
    "SamplerConfig": "harmonica.samplers",
    "apply": "harmonica.integrations.diffusers_pipeline",
    "learned_steps": "harmonica.training.presets",
    "load_model": "harmonica.models.loading",
    "make_sampler": "harmonica.samplers",
    "remove": "harmonica.integrations.diffusers_pipeline",
    "sample": "harmonica.core.sampling",
    "train_pipeline": "harmonica.pipeline_training.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access, since importing torch takes seconds."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
