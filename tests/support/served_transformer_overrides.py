"""What the rules of `served_transformers` do not find, by pipeline: parts, texts, and arguments of a call."""

import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.schedulers import CogVideoXDDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

TEXT, WIDTH = 5, 32
_NO_STAND_IN = {"not_tried": "whose call needs its own text encoder, VAE or processor"}


def embedded(texts: Sequence[str], *shape: int) -> Tensor:
    """Return a random embedding of each text (N, ...)."""
    generators = [torch.Generator().manual_seed(zlib.crc32(text.encode())) for text in texts]
    return torch.stack([torch.randn(*shape, generator=each) for each in generators])


def _text(rows: Sequence[str]) -> Tensor:
    return embedded(rows, TEXT, WIDTH)


def _mask(rows: Sequence[str]) -> Tensor:
    return torch.ones(len(rows), TEXT, dtype=torch.bool)


def _fibo(prompt: Sequence[str], **_: Any) -> Any:
    both = _text(prompt), _text([""] * len(prompt))
    ids, mask = torch.zeros(TEXT, 3), torch.ones(len(prompt), TEXT)
    return *both, ids, mask, mask, *([each] * 4 for each in both)


def _long_cat(prompt: Sequence[str], **_: Any) -> Any:
    return _text(prompt or [""]), torch.zeros(TEXT, 3)


class _Part:
    """Stands for a part of a pipeline that nothing but its settings is asked for."""

    config = SimpleNamespace(shift_factor=0.0, scaling_factor=1.0, block_out_channels=[1] * 4)

    def to(self, *_: Any) -> "_Part":
        return self


OVERRIDES: dict[str, dict[str, Any]] = {
    "BriaFibo2Pipeline": _NO_STAND_IN,
    "BriaFiboPipeline": {"methods": {"encode_prompt": _fibo}},
    "BriaPipeline": {"parts": {"vae": _Part}},
    "CogView3PlusPipeline": {"parts": {"scheduler": CogVideoXDDIMScheduler}},
    "Cosmos2TextToImagePipeline": {
        "parts": {
            "safety_checker": _Part,
            "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        },
    },
    "GlmImagePipeline": {
        "texts": {"prior_token_ids": lambda rows: torch.arange(16).repeat(len(rows), 1)},
    },
    "HiDreamImagePipeline": {
        "texts": {
            "prompt_embeds_t5": _text,
            "prompt_embeds_llama3": lambda rows: embedded(rows, 2, TEXT, WIDTH).transpose(0, 1),
        },
    },
    "HunyuanDiTPipeline": {
        "parts": {"scheduler": DDPMScheduler},
        "texts": {"prompt_embeds_2": _text, "prompt_attention_mask_2": _mask},
    },
    "HunyuanImagePipeline": {"texts": {"prompt_embeds_2": _text, "prompt_embeds_mask_2": _mask}},
    "Ideogram4Pipeline": _NO_STAND_IN,
    "JoyImageEditPipeline": _NO_STAND_IN,
    "Kandinsky5T2IPipeline": {
        "note": ", at its own seven sizes alone",
        "texts": {
            "prompt_embeds_qwen": _text,
            "prompt_embeds_clip": lambda rows: embedded(rows, WIDTH),
            "prompt_cu_seqlens": lambda rows: TEXT * torch.arange(len(rows) + 1, dtype=torch.int32),
        },
    },
    "Krea2Pipeline": {"texts": {"prompt_embeds": lambda rows: embedded(rows, TEXT, 2, WIDTH)}},
    "LongCatImagePipeline": {
        "call": {"enable_prompt_rewrite": False},
        "methods": {"encode_prompt": _long_cat},
        "note": ", one image a call",
    },
    "OmniGenPipeline": _NO_STAND_IN,
    "PRXPipeline": {"note": ", one image a call"},
    "QwenImage21Pipeline": _NO_STAND_IN,
    "ZImagePipeline": {"texts": {"prompt_embeds": lambda rows: list(_text(rows))}},
}
