"""Samplers with classifier-free guidance.

Four are the package's own; others use diffusers' schedulers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harmonica.samplers.base import Sampler, State, guide
    from harmonica.samplers.choice import make_sampler, with_scheduler
    from harmonica.samplers.config import MAX_GUIDANCE_SCALE, SamplerConfig, SamplerName
    from harmonica.samplers.respaced import Ddim, Iddpm

__all__ = [
    "MAX_GUIDANCE_SCALE",
    "Ddim",
    "Iddpm",
    "Sampler",
    "SamplerConfig",
    "SamplerName",
    "State",
    "guide",
    "make_sampler",
    "with_scheduler",
]

_HOMES = {
    "MAX_GUIDANCE_SCALE": "config",
    "Ddim": "respaced",
    "Iddpm": "respaced",
    "Sampler": "base",
    "SamplerConfig": "config",
    "SamplerName": "config",
    "State": "base",
    "guide": "base",
    "make_sampler": "choice",
    "with_scheduler": "choice",
}


def __getattr__(name: str) -> Any:
    """Import a name on first access.

    Who draws the noise of rows alone (`noise`) needs no torch.
    """
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
