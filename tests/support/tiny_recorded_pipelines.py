"""Small pipelines of diffusers whose transformers have no branch files here, and routers for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny_transformers
import torch
from diffusers import (
    FluxPipeline,
    Krea2Pipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    WanPipeline,
    ZImagePipeline,
)
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.plan import Plan
from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.integrations.recorded.view import RecordedTransformer
from harmonica.integrations.recorded.weights import fingerprint_of
from harmonica.samplers import SamplerConfig

STEPS = 4
TEXT, WIDTH = tiny_transformers.TEXT, tiny_transformers.WIDTH


@dataclass
class Case:
    """A pipeline, the arguments of a call of it, and a view of its transformer that is off again."""

    pipe: Any
    call: dict[str, Any]
    view: RecordedTransformer

    def run(self, seed: int = 0, **changes: Any) -> Tensor:
        """Latents (N, ...) for a seed."""
        generator = torch.Generator().manual_seed(seed)
        settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": generator}
        return self.pipe(**self.call | settings | changes)[0]

    @property
    def branches(self) -> int:
        return len(self.view.branches)

    def artifact(self, plan: Plan | None = None, *, reuse: str = "hold") -> RouterArtifact:
        """A router whose plan is the given one, or reuses about half of its entries."""
        if plan is None:
            logits = torch.randn(STEPS, self.branches, generator=torch.Generator().manual_seed(0))
        else:
            logits = torch.where(plan.to_tensor(), 1.0, -1.0)
        transformers = transformers_of(self.pipe)
        weights = fingerprint_of(transformers)
        macs = self.view.macs()
        return RouterArtifact(
            logits_TB=logits,
            threshold=0.5,
            sampler=SamplerConfig(
                name="diffusers",
                num_inference_steps=STEPS,
                scheduler={"_class_name": type(self.pipe.scheduler).__name__},
            ),
            reuse=reuse,
            model={**self.view.shape(), "transformers": len(transformers), "weights": weights.exact},
            rounded_weights=weights.rounded,
            ideal_speedup=Plan.from_scores(logits.sigmoid(), 0.5).ideal_speedup(macs),
            macs_full=macs.full * STEPS,
        )


def _text(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _embeds(width: int = WIDTH, rows: int = 2) -> dict[str, Tensor]:
    return {
        "prompt_embeds": _text(rows, TEXT, width, seed=1),
        "negative_prompt_embeds": _text(rows, TEXT, width, seed=2),
    }


def _pooled(rows: int = 2) -> dict[str, Tensor]:
    return {
        "pooled_prompt_embeds": _text(rows, WIDTH, seed=3),
        "negative_pooled_prompt_embeds": _text(rows, WIDTH, seed=4),
    }


def _masks(rows: int = 2) -> dict[str, Tensor]:
    names = ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    return {name: torch.ones(rows, TEXT, dtype=torch.bool) for name in names}


_FLUX_PARTS = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
_SIZE = {"height": 64, "width": 96}


def _flux(is_guided: bool) -> tuple[Any, dict[str, Any]]:
    """Guidance-distilled, one call a step; or with true guidance, two calls in contexts."""
    transformer = tiny_transformers.make_transformer("FluxTransformer2DModel")
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **dict.fromkeys(_FLUX_PARTS)
    )
    both = _embeds() | _pooled()
    own = {key: value for key, value in both.items() if is_guided or "negative" not in key}
    return pipe, own | _SIZE | ({"true_cfg_scale": 3.0} if is_guided else {})


def _sd3() -> tuple[Any, dict[str, Any]]:
    """Guidance by batch."""
    transformer = tiny_transformers.make_transformer("SD3Transformer2DModel")
    parts = dict.fromkeys((*_FLUX_PARTS, "text_encoder_3", "tokenizer_3"))
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts
    )
    return pipe, _embeds() | _pooled() | _SIZE | {"guidance_scale": 4.0}


def _wan(transformers: int) -> tuple[Any, dict[str, Any]]:
    """Two calls in contexts; with two transformers, each for its part of the timesteps."""
    first, second = (
        tiny_transformers.make_transformer("WanTransformer3DModel", seed=seed) for seed in (0, 1)
    )
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        ),
        transformer=first,
        transformer_2=second if transformers == 2 else None,
        boundary_ratio=0.6 if transformers == 2 else None,
    )
    return pipe, _embeds() | {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 4.0}


def _qwen() -> tuple[Any, dict[str, Any]]:
    """Two calls in contexts."""
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_transformers.make_transformer("QwenImageTransformer2DModel"),
    )
    return pipe, _embeds() | _masks() | _SIZE | {"true_cfg_scale": 3.0}


def _krea2() -> tuple[Any, dict[str, Any]]:
    """Two calls at one timestep, in no context."""
    pipe = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_transformers.make_transformer("Krea2Transformer2DModel"),
    )
    embeds = {name: value[:, :, None].repeat(1, 1, 2, 1) for name, value in _embeds().items()}
    return pipe, embeds | _masks() | _SIZE | {"guidance_scale": 4.0}


def _z_image(truncation: float) -> tuple[Any, dict[str, Any]]:
    """Model times that rise; guidance that ends on the way, and with it half of the batch."""
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=tiny_transformers.make_transformer("ZImageTransformer2DModel"),
    )
    embeds = {name: list(value) for name, value in _embeds().items()}
    return pipe, embeds | _SIZE | {"guidance_scale": 4.0, "cfg_truncation": truncation}


_MAKERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "flux": lambda: _flux(False),
    "flux guided": lambda: _flux(True),
    "sd3": _sd3,
    "wan 2.1": lambda: _wan(1),
    "wan 2.2": lambda: _wan(2),
    "qwen": _qwen,
    "krea2": _krea2,
    "z-image": lambda: _z_image(1.0),
    "z-image truncated": lambda: _z_image(0.6),
}
KINDS = tuple(_MAKERS)


def make_case(kind: str) -> Case:
    """Return a pipeline and a recorded view of its transformer."""
    pipe, call = _MAKERS[kind]()
    pipe.set_progress_bar_config(disable=True)
    transformer = pipe.transformer
    name = type(transformer).__name__
    view = RecordedTransformer(transformer, transformer.forward)
    view.record(**tiny_transformers.make_inputs(name, transformer))
    macs = view.macs()
    view.close()
    view.macs = lambda: macs  # type: ignore[method-assign]
    return Case(pipe, call, view)


def apart(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
