"""Put caches of other libraries on diffusers' own module, as baselines.

They are what a user could choose instead of this project.

Each module has our model's weights, in diffusers' convention, and is compared with its own uncached images
and its own uncached time. Optional: cache-dit is used where it is installed.
"""

import importlib.util
import os
import tempfile
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.data.batch import Batch
from harmonica.models.base import BranchedTransformer
from harmonica.models.diffusers_folder import find_transformer, write_diffusers
from harmonica.models.loading import ModelConfig, read_model
from harmonica.samplers import SamplerConfig, make_sampler
from harmonica.torchvision_ops import ensure_torchvision_imports

from ..evaluation.variants import Variant

UNCACHED = "diffusers, uncached"
_WARMUP_STEPS = 2


class _Switch(ABC):
    """A library's cache on a module, which is reset before each trajectory.

    It is enabled at the first one.
    """

    package = "diffusers"
    settings: tuple[float, ...] = ()
    """Settings to measure, since none of the libraries accepts a target speed."""

    @abstractmethod
    def start(self, module: Any, setting: float, num_steps: int) -> None:
        """Enable or reset the cache; called before each trajectory."""


class _Diffusers(_Switch):
    @abstractmethod
    def config(self, setting: float) -> Any:
        """Return the settings of a cache of diffusers itself."""

    def start(self, module: Any, setting: float, num_steps: int) -> None:
        if module.is_cache_enabled:
            module.disable_cache()
        module.enable_cache(self.config(setting))


class _TaylorSeer(_Diffusers):
    settings = (2, 3)

    def config(self, setting: float) -> Any:
        from diffusers import TaylorSeerCacheConfig

        return TaylorSeerCacheConfig(
            cache_interval=int(setting),
            disable_cache_before_step=_WARMUP_STEPS,
            max_order=1,
            cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)$"],  # it knows no DiT by itself
        )


class _FirstBlockCache(_Diffusers):
    settings = (0.05, 0.1, 0.15, 0.2)

    def config(self, setting: float) -> Any:
        from diffusers import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=setting)


class _DBCache(_Switch):
    package = "cache_dit"
    settings = (0.05, 0.08, 0.12, 0.2)
    is_taylor = False

    def start(self, module: Any, setting: float, num_steps: int) -> None:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # else some ten lines a trajectory
        import cache_dit
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=setting,
            max_warmup_steps=_WARMUP_STEPS,
            num_inference_steps=num_steps,
        )
        if getattr(module, "_is_cached", False):
            cache_dit.refresh_context(module, cache_config=config)
            return
        adapter = cache_dit.BlockAdapter(
            transformer=module,
            blocks=module.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            patch_functor=DiTPatchFunctor(),
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if self.is_taylor else None
        cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)


class _DBCacheTaylor(_DBCache):
    is_taylor = True


_LIBRARIES: dict[str, _Switch] = {
    "cache-dit DBCache": _DBCache(),
    "cache-dit DBCache + TaylorSeer": _DBCacheTaylor(),
    "diffusers TaylorSeer": _TaylorSeer(),
    "diffusers FirstBlockCache": _FirstBlockCache(),
}


def _module(config: ModelConfig, device: torch.device, is_cacheable: bool) -> Any:
    """Load diffusers' DiT with the configured model's weights and precision.

    A user of diffusers has it so. A cacheable one takes the caches of diffusers itself.

    Raises:
        ValueError: the weights cannot be read, as in `read_model`, or the model is no DiT.
    """
    ensure_torchvision_imports()
    from diffusers.models.cache_utils import CacheMixin
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    class CachedDiT(DiTTransformer2DModel, CacheMixin):  # type: ignore[misc]
        pass

    with tempfile.TemporaryDirectory() as folder:
        stored = read_model(config.path, config.revision, config.shape)
        write_diffusers(Path(folder) / "model", stored)
        found = find_transformer(Path(folder) / "model")
        # cache-dit knows the class by its name.
        kind = CachedDiT if is_cacheable else DiTTransformer2DModel
        dtype = getattr(torch, config.dtype)
        module = kind.from_pretrained(found, low_cpu_mem_usage=False, dtype=dtype)
    return module.eval().requires_grad_(False).to(device)


@dataclass(frozen=True)
class LibraryVariant(Variant):
    """A variant that samples by diffusers' module with a cache on it, or with none.

    It is sampled step by step, as our own variants are.
    """

    weights: ModelConfig = field(default_factory=ModelConfig)
    """The model whose weights the module has."""
    library: str = ""
    """A key of `_LIBRARIES`; empty for the uncached module."""
    setting: float = 0.0
    _built: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def _is_of_diffusers(self) -> bool:
        return bool(self.library) and _LIBRARIES[self.library].package == "diffusers"

    @torch.inference_mode()
    def sample(self, model: BranchedTransformer, batch: Batch) -> Tensor:
        """Return images (N, C, H, W), with the library's cache enabled and reset."""
        if "module" not in self._built:
            self._built["module"] = _module(self.weights, batch.noise_NCHW.device, self._is_of_diffusers)
        module, sampler = self._built["module"], make_sampler(model, self.sampler)
        if self.library:
            _LIBRARIES[self.library].start(module, self.setting, sampler.num_steps)
        state = sampler.start(batch.noise_NCHW, batch.condition_N, batch.keys)
        labels_M = model.guided_condition(batch.condition_N) if sampler.is_guided else batch.condition_N
        for i in reversed(range(sampler.num_steps)):
            half = sampler.finish(state)
            x_MCHW = torch.cat([half, half]) if sampler.is_guided else half
            timestep_M = torch.full((len(x_MCHW),), sampler.timesteps[i], device=x_MCHW.device)
            with module.cache_context("guided") if self._is_of_diffusers else nullcontext():
                output = module(x_MCHW.to(module.dtype), timestep=timestep_M, class_labels=labels_M).sample
            state = sampler.advance(i, state, sampler.guide(output.to(x_MCHW.dtype)))
        return sampler.finish(state)


def library_variants(model: ModelConfig, sampler: SamplerConfig) -> list[LibraryVariant]:
    """Return the uncached module, and every installed library at its settings."""
    variants = [LibraryVariant(UNCACHED, sampler, reference=UNCACHED, weights=model)]
    for name, switch in _LIBRARIES.items():
        if importlib.util.find_spec(switch.package) is None:
            continue
        for setting in switch.settings:
            title = f"{name} {setting:g}"
            variants.append(
                LibraryVariant(
                    title, sampler, reference=UNCACHED, weights=model, library=name, setting=setting
                )
            )
    return variants
