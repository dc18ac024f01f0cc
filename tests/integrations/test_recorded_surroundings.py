"""What comes to a recorded transformer beside its plan: adapters, caches, offloading, odd schedulers."""

import copy
import logging
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, GlmImagePipeline
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_recorded_pipelines import TEXT, WIDTH, Case, make_case
from tiny_transformers import make_transformer
from torch import Tensor

import harmonica
from harmonica.integrations.recorded.trajectory import _kind_of_inputs
from tests.integrations.test_attach_adapters import Adapted

HALF = harmonica.EvenSteps(speedup=1.5)
MODULES = harmonica.EvenSteps(speedup=1.5, cacheable=("attn", "mlp", "single"))


def adapt(case: Case) -> None:
    """As a LoRA on the projections that end the blocks, which are what a plan reuses."""
    torch.manual_seed(5)
    for block in case.pipe.transformer.single_transformer_blocks:
        block.proj_out = Adapted(block.proj_out)
    for block in case.pipe.transformer.transformer_blocks:
        block.ff.net[2] = Adapted(block.ff.net[2])


def unadapt(case: Case) -> None:
    for block in case.pipe.transformer.single_transformer_blocks:
        block.proj_out = block.proj_out.base_layer
    for block in case.pipe.transformer.transformer_blocks:
        block.ff.net[2] = block.ff.net[2].base_layer


@pytest.mark.parametrize("kind", ["router", "modules", "blocks"])
def test_adapters_come_and_go_before_a_plan_and_after(kind):
    def plan_of(case: Case) -> Any:
        return {"router": case.artifact, "modules": lambda: MODULES, "blocks": lambda: HALF}[kind]()

    first, later = make_case("flux"), make_case("flux")
    adapt(first)
    harmonica.apply(first.pipe, plan_of(first))
    harmonica.apply(later.pipe, plan_of(later))
    plain = later.run()
    adapt(later)
    adapted = later.run()
    assert type(adapted) is Tensor and adapted.isfinite().all()
    assert torch.equal(adapted, first.run()) and not torch.allclose(adapted, plain, rtol=1e-3)
    unadapt(later)
    assert torch.equal(later.run(), plain)
    harmonica.remove(later.pipe)
    assert not any("forward" in vars(module) for module in later.pipe.transformer.modules())


@pytest.mark.parametrize("plan", [HALF, MODULES])
def test_a_cache_that_comes_after_a_plan_is_refused_at_the_next_call(flux, plan):
    harmonica.apply(flux.pipe, plan)
    wanted = flux.run()
    flux.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"has the hook .*, which changes what is computed"):
        flux.run()
    flux.pipe.transformer.disable_cache()
    assert torch.equal(flux.run(), wanted)


def offload(case: Case, kind: str) -> None:
    of_blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(case.pipe.transformer, torch.device("cpu"), offload_type=kind, **of_blocks)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("plan", [HALF, MODULES])
@pytest.mark.parametrize("is_applied_first", [True, False])
def test_group_offloading_in_any_order(flux, kind, plan, is_applied_first):
    whole = flux.run()
    harmonica.apply(flux.pipe, plan)
    wanted = flux.run()
    if not is_applied_first:
        harmonica.remove(flux.pipe)
    offload(flux, kind)
    if not is_applied_first:
        harmonica.apply(flux.pipe, plan)
    for _ in range(2):
        assert torch.equal(flux.run(), wanted)
    harmonica.remove(flux.pipe)
    assert torch.equal(flux.run(), whole)
    harmonica.apply(flux.pipe, plan)
    assert torch.equal(flux.run(), wanted), "once more, with what the first plan has left of the hooks"
    harmonica.remove(flux.pipe)
    for name in ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading"):
        HookRegistry.check_if_exists_or_initialize(flux.pipe.transformer).remove_hook(name, recurse=True)
    assert torch.equal(flux.run(), whole)


class FlowMatchOfCopies(FlowMatchEulerDiscreteScheduler):
    """Steps a copy of itself, as SkyReels-V2 with diffusion forcing does: its own count stays at none."""

    def step(self, output: Tensor, timestep: Tensor, sample: Tensor, **kwargs: Any) -> Any:
        if timestep == self.timesteps[0]:
            self._copy = copy.copy(self)
        return FlowMatchEulerDiscreteScheduler.step(self._copy, output, timestep, sample, **kwargs)


@pytest.mark.parametrize("kind", ["flux", "krea2", "z-image"])
def test_a_pipeline_may_step_copies_of_its_scheduler(kind):
    case = make_case(kind)
    harmonica.apply(case.pipe, HALF)
    wanted = case.run()
    case.pipe.scheduler = FlowMatchOfCopies.from_config(case.pipe.scheduler.config)
    for _ in range(2):
        assert torch.equal(case.run(), wanted)
        assert case.pipe.scheduler.step_index is None


def test_one_step_is_computed_and_few_take_the_fastest_plan(flux, caplog):
    whole = flux.run(num_inference_steps=1)
    harmonica.apply(flux.pipe, harmonica.EvenSteps(speedup=3.5))
    with caplog.at_level(logging.INFO):
        assert torch.equal(flux.run(num_inference_steps=1), whole)
        assert flux.run(num_inference_steps=3).isfinite().all()
        assert flux.run(num_inference_steps=9).isfinite().all()
    told = [each for each in caplog.records if "evenly spread steps" in each.message]
    assert [each.levelname for each in told] == ["WARNING", "WARNING", "INFO"]
    assert [each.message.split("steps: ")[1][:10] for each in told[:2]] == ["0 of 1 are", "2 of 3 are"]


def test_values_are_not_reused_between_calls_of_other_kinds():
    """As where the first step fills a cache of keys and values, and later ones read it."""
    x, kind = torch.zeros(2, 3), _kind_of_inputs
    assert kind((x,), {"t": 3}) == kind((x + 1,), {"t": 4}), "a timestep is no kind"
    assert kind((x,), {"mode": "extract"}) != kind((x,), {"mode": "cached"})
    assert kind((x,), {"mode": None}) != kind((x,), {"mode": "cached"})
    assert kind((x,), {"is_cached": True}) != kind((x,), {"is_cached": False})
    assert kind((x,), {}) != kind((x[:1],), {}) and kind((x,), {}) != kind((x,), {"mask": x})
    assert kind((x,), {"given": None}) == kind((x,), {"given": {}}), "FLUX's, where a second call was refused"


class _Vae(torch.nn.Module):
    """Gives a picture's latents by averages of its pixels."""

    dtype, device = torch.float32, torch.device("cpu")

    class config:
        block_out_channels, latent_channels = (1, 1, 1, 1), 4
        latents_mean, latents_std = [0.0] * 4, [1.0] * 4

    def encode(self, x: Tensor) -> Any:
        latents = torch.nn.functional.avg_pool2d(x, 8)
        return type("Encoded", (), {"latents": torch.cat([latents, latents[:, :1]], 1)})


def test_a_call_that_fills_a_cache_before_the_steps_is_none_of_them(monkeypatch):
    """GLM-Image reads the picture that is edited so, and adds to its cache at each such call."""
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "processor", "vision_language_encoder"))
    transformer = make_transformer("GlmImageTransformer2DModel")
    pipe = GlmImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), transformer=transformer, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.vae = _Vae()
    caches: list[int] = []
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    blocks = type(transformer.transformer_blocks[0])
    forward = blocks.forward

    def counted(block: Any, *args: Any, kv_cache: Any = None, **kwargs: Any) -> Any:
        if kv_cache is not None and kv_cache.mode == "read":
            caches.append(sum(keys.shape[1] for keys in kv_cache.k_caches))
        return forward(block, *args, kv_cache=kv_cache, **kwargs)

    monkeypatch.setattr(blocks, "forward", counted)

    def run() -> Tensor:
        embeds = torch.randn(1, TEXT, WIDTH, generator=torch.Generator().manual_seed(1))
        return pipe(
            image=[picture],
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            prior_token_ids=torch.arange(16)[None],
            prior_token_image_ids=[torch.arange(16)],
            source_image_grid_thw=[torch.tensor([[1, 4, 4]])],
            height=64,
            width=64,
            num_inference_steps=8,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            return_dict=False,
        )[0]

    whole = run()
    tokens = set(caches)
    harmonica.apply(pipe, HALF)
    first = run()
    assert torch.equal(run(), first) and not torch.equal(first, whole)
    assert len(tokens) == 1 and set(caches) == tokens
