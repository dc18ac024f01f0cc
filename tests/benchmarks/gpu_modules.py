"""diffusers' own modules as `python -m tests.benchmarks gpu` calls them: (sample, timestep, condition)."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import harmonica
from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.execution.graphs import GraphStore
from harmonica.models.dit.diffusers_view import DiffusersDiT
from harmonica.samplers import Sampler, make_sampler
from harmonica.torchvision_ops import ensure_torchvision_imports
from tests.benchmarks.hardware import Hardware, compile_each
from tests.benchmarks.model import make_diffusers_dit

Module = Callable[[Tensor, Tensor, Any], Tensor]


def _dit_call(module: Any, dtype: torch.dtype) -> Module:
    def run(sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        output: Tensor = module(sample.to(dtype), timestep, labels, return_dict=False)[0]
        return output.float()

    return run


def diffusers_dit(model: Any, hardware: Hardware, *, mode: str = "") -> Module:
    """Its DiT with our model's weights, the blocks compiled.

    Args:
        mode: of torch.compile, for the whole instead; or eager.
    """
    module = make_diffusers_dit(model, hardware)
    call = _dit_call(module, hardware.dtype)
    if mode == "eager":
        return call
    if not mode:
        compile_each(module.transformer_blocks)
        return call
    module.compile(mode=mode if hardware.is_gpu else "default", dynamic=False)

    def run(sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # the last output may be overwritten
        return call(sample, timestep, labels)

    return run


def planned_dit(sampler: Sampler, hardware: Hardware, plan: Plan) -> tuple[Module, Callable[[], GraphStore]]:
    """diffusers' DiT under a plan of `harmonica.apply`, each step replayed; and what keeps the recordings."""
    module = make_diffusers_dit(sampler.model, hardware)
    scores_TB = torch.tensor(plan.compute, dtype=torch.float32)
    ready = make_sampler(DiffusersDiT(module), sampler.config)
    artifact = RouterArtifact.build(4 * scores_TB - 2, ready, threshold=0.5, reuse="hold", training={})
    harmonica.apply(module, artifact, allow_other_sampler=True, execution="graphed")
    return _dit_call(module, hardware.dtype), lambda: module._harmonica.recordings


def diffusers_pixart(model: Any, hardware: Hardware) -> Module:
    """Its PixArt, of one precision and with compiled blocks."""
    module = copy.deepcopy(model.transformer).to(hardware.dtype)
    compile_each(module.transformer_blocks)

    def run(sample: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        output: Tensor = module(
            sample.to(hardware.dtype),
            encoder_hidden_states=condition.embeddings,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=condition.mask,
            return_dict=False,
        )[0]
        return output.float()

    return run


def captured(module: Module) -> Module:
    """The module replayed from one CUDA graph, captured at its first call; on a CPU as it is.

    In place of torch.compile of the whole, which takes a minute a shape and fuses no more.
    """
    kept: dict[str, Any] = {}

    def run(sample: Tensor, timestep: Tensor, condition: Any) -> Tensor:
        if not sample.is_cuda:
            return module(sample, timestep, condition)
        if not kept:
            kept["inputs"] = (sample.clone(), timestep.clone())
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    module(*kept["inputs"], condition)
            torch.cuda.current_stream().wait_stream(stream)
            kept["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(kept["graph"], stream=stream):
                kept["output"] = module(*kept["inputs"], condition)
        for buffer, given in zip(kept["inputs"], (sample, timestep), strict=True):
            buffer.copy_(given)
        kept["graph"].replay()
        output: Tensor = kept["output"]
        return output

    return run


def taylor_seer(model: Any, hardware: Hardware) -> tuple[Module, Callable[[], None]]:
    """Its own TaylorSeer, which forecasts attention and MLP at every second step; and what begins anew."""
    ensure_torchvision_imports()
    from diffusers import DiTTransformer2DModel, TaylorSeerCacheConfig
    from diffusers.models.cache_utils import CacheMixin

    class CachedDiT(DiTTransformer2DModel, CacheMixin):  # type: ignore[misc]
        pass

    module: Any = make_diffusers_dit(model, hardware, CachedDiT)
    call = _dit_call(module, hardware.dtype)
    config = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        max_order=1,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)$"],
    )

    def start() -> None:
        if module.is_cache_enabled:
            module.disable_cache()
        module.enable_cache(config)

    def run(sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        with module.cache_context("guided"):
            return call(sample, timestep, labels)

    return run, start


def with_db_cache(model: Any, hardware: Hardware, num_steps: int) -> tuple[Module, Callable[[], None]]:
    """cache-dit's DBCache: all blocks but the first reused at every second step."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")
    import cache_dit
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    module = make_diffusers_dit(model, hardware)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        residual_diff_threshold=1e9,
        max_warmup_steps=1,
        max_continuous_cached_steps=1,
        num_inference_steps=num_steps,
    )
    adapter = cache_dit.BlockAdapter(
        transformer=module,
        blocks=module.transformer_blocks,
        forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        patch_functor=DiTPatchFunctor(),
    )
    cache_dit.enable_cache(adapter, cache_config=config)

    def start() -> None:
        cache_dit.refresh_context(module, cache_config=config)

    return _dit_call(module, hardware.dtype), start
