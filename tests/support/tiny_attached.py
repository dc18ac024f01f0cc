"""Small pipelines of diffusers beside our own model of the same weights, and a router for it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_pixart
import tiny_sana
import torch
from diffusers import DiTPipeline, SanaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from tiny_pipeline import LINEAR, make_vae, write_pipeline
from torch import Tensor

import harmonica
from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.core.segments import segment_starts
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import ModelConfig, load_model
from harmonica.samplers import SamplerConfig, make_sampler

STEPS = 4
KINDS = ("dit", "sigma", "alpha 1024")


def config(name: str = "dpm-solver++", **settings) -> SamplerConfig:
    defaults = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "clip_sample": False}
    return SamplerConfig(name=name, **defaults | settings)


@dataclass
class Case:
    """Everything in float64."""

    pipe: Any
    model: BranchedTransformer
    """Ours: of its own, loaded from the pipeline's folder, for a DiT; around the pipeline's for a PixArt."""
    noise: Tensor
    condition: Any
    one_call: dict[str, Any]
    """Of the transformer, without sample and timestep."""
    run: Callable[..., Tensor]
    """Latents (N, C, H, W) by the pipeline; takes its keywords."""

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    def artifact(
        self,
        *,
        reuse: str = "hold",
        sampler: SamplerConfig | None = None,
        seed: int = 0,
        is_corrected: bool = False,
        has_segments: bool = False,
    ) -> RouterArtifact:
        """A router that reuses about half of its entries; a corrected one adds to every output.

        One with segments reuses whole steps, and one of them from the second half on.
        """
        sampler = sampler or config()
        shape = (sampler.num_inference_steps, len(self.model.branches))
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        ready = make_sampler(self.model, sampler)
        segmented: dict[str, Any] = {}
        if has_segments:
            logits = torch.tensor([-1.0, 1.0]).repeat(shape[0])[: shape[0], None].repeat(1, shape[1])
            logits[1, shape[1] // 2 :] = -1
            plan = Plan.from_scores(logits.sigmoid(), 0.5)
            weights_TBK = torch.linspace(0.1, 0.4, shape[0])[:, None, None].repeat(1, shape[1], 2)
            segmented = {
                "forecast_TBK": weights_TBK,
                "segments": segment_starts(self.model, plan),
            }
        correction_TJ = torch.linspace(-0.3, 0.3, shape[0])[:, None] if is_corrected else None
        return RouterArtifact.build(
            logits, ready, threshold=0.5, reuse=reuse, training={}, correction_TJ=correction_TJ, **segmented
        )

    def ours(self, artifact: RouterArtifact, sampler: SamplerConfig | None = None) -> Tensor:
        """Latents by our own sampler under the same plan."""
        ready = make_sampler(self.model, sampler or artifact.sampler)
        return sample(ready, self.noise, self.condition, artifact.plan, reuse=artifact.reuse)

    def call(self, timestep: int, n: int | None = None, **changes) -> Tensor:
        """One forward."""
        arguments = {name: _first(value, n) for name, value in self.one_call.items()} | changes
        noise = self.noise[:n]
        with torch.no_grad():
            output = self.transformer(noise, timestep=torch.full((len(noise),), timestep), **arguments)
        return output[0]


def _first(value: Any, n: int | None) -> Any:
    if isinstance(value, dict):
        return {name: _first(each, n) for name, each in value.items()}
    return value if value is None or n is None else value[:n]


def make_case(kind: str, folder: Path) -> Case:
    """`dit` or one of PixArt's `tiny_pixart.FAMILY`; the largest caches cross-attention too.

    Args:
        folder: where a DiT's pipeline is written.
    """
    return _dit(folder) if kind == "dit" else _pixart(kind)


def _dit(folder: Path) -> Case:
    pipe = DiTPipeline.from_pretrained(write_pipeline(folder))
    pipe.transformer.double()
    pipe.vae.double()
    pipe.scheduler = DPMSolverMultistepScheduler(**LINEAR)
    pipe.set_progress_bar_config(disable=True)
    decode, seen = pipe.vae.decode, []
    pipe.vae.decode = lambda latents: (seen.append(latents), decode(latents))[1]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def run(seed: int = 3, **changes) -> Tensor:
        settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0} | changes
        pipe([207, 360], generator=torch.Generator().manual_seed(seed), output_type="pt", **settings)
        return seen[-1] * pipe.vae.config.scaling_factor

    labels = torch.tensor([207, 360])
    model = load_model(ModelConfig(path=str(folder))).model.double()
    return Case(pipe, model, noise, labels, {"class_labels": labels}, run)


def _pixart(kind: str) -> Case:
    cacheable = ("attn", "cross", "mlp") if kind == "alpha 1024" else ()
    model = tiny_pixart.make_pixart(kind, *cacheable)
    parts = {"tokenizer": None, "text_encoder": None, "vae": make_vae().double()}
    pipe = tiny_pixart.pipeline_class(kind.split()[0])(
        transformer=model.transformer, scheduler=DPMSolverMultistepScheduler(**LINEAR), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    noise, condition = tiny_pixart.make_batch(kind, 2)

    def run(seed: int = 1, **changes) -> Tensor:
        noise, condition = tiny_pixart.make_batch(kind, 2, seed=seed)
        condition = condition.to(pipe._execution_device)
        settings = {"num_inference_steps": STEPS, "guidance_scale": 3.0} | changes
        return pipe(
            negative_prompt=None,
            prompt_embeds=condition.embeddings,
            prompt_attention_mask=condition.mask.long(),
            negative_prompt_embeds=condition.negative_embeddings,
            negative_prompt_attention_mask=condition.negative_mask.long(),
            latents=noise,
            height=2 * noise.shape[2],
            width=2 * noise.shape[3],
            use_resolution_binning=False,
            output_type="latent",
            **settings,
        ).images

    return Case(pipe, model, noise, condition, tiny_pixart.diffusers_arguments(condition), run)


def planned_sana(**how: Any) -> SanaPipeline:
    """A Sana pipeline whose transformer is under a plan, which `harmonica.apply` puts on in the way given."""
    model = tiny_sana.make_sana("1.5")
    ready = make_sampler(model, tiny_sana.config(num_inference_steps=STEPS))
    logits = torch.randn(STEPS, len(model.branches), generator=torch.Generator().manual_seed(0))
    artifact = RouterArtifact.build(logits, ready, threshold=0.5, reuse="forecast", training={})
    harmonica.apply(model.transformer, artifact, **how)
    scheduler = copy.deepcopy(tiny_sana.SCHEDULERS["dpm-solver++"])
    pipe = SanaPipeline(None, None, None, model.transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sana_arguments(noise: Tensor, condition: Any) -> dict[str, Any]:
    """What a Sana pipeline is called with for latents of this size and these prompts."""
    return {
        "negative_prompt": None,
        "prompt_embeds": condition.embeddings,
        "prompt_attention_mask": condition.mask.long(),
        "negative_prompt_embeds": condition.negative_embeddings,
        "negative_prompt_attention_mask": condition.negative_mask.long(),
        "num_inference_steps": STEPS,
        "height": 32 * noise.shape[2],
        "width": 32 * noise.shape[3],
        "use_resolution_binning": False,
        "output_type": "latent",
    }


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative distance."""
    assert ours.shape == theirs.shape and theirs.norm() > 0
    return ((ours - theirs).norm() / theirs.norm()).item()


def planned(case: Case, **artifact) -> tuple[Tensor, Tensor]:
    """Latents without and with a plan that is taken off again."""
    without = case.run()
    harmonica.apply(case.transformer, case.artifact(**artifact))
    latents = case.run()
    harmonica.remove(case.transformer)
    assert not torch.equal(without, latents)
    return without, latents
