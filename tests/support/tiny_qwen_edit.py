"""Folders of small random Qwen-Image-Edit pipelines, whole: VAE, Qwen2.5-VL, tokenizer and processor."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageTransformer2DModel
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHANNELS, WIDTH, HEADS = 4, 32, 2
_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_PICTURE_TOKENS = 4


def _make_tokenizer() -> Qwen2Tokenizer:
    """A token for each byte, and the special ones."""
    letters = list(bytes_to_unicode().values())
    vocab = {token: place for place, token in enumerate([*letters, *_SPECIAL])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=list(_SPECIAL[1:]))


def _make_processor(tokenizer: Any) -> Qwen2VLProcessor:
    """Any picture is at most four tokens."""
    pixels = _PICTURE_TOKENS * 28 * 28
    images = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": pixels})
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template="{{ messages }}")


def _make_encoder(tokenizer: Any) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(1)
    ids = dict(zip(_SPECIAL, tokenizer.convert_tokens_to_ids(list(_SPECIAL)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": HEADS,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _make_vae() -> AutoencoderKLQwenImage:
    """32 pixels a latent along each side, so that the pipeline's megapixel is 256 tokens."""
    torch.manual_seed(2)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1] * 6,
        num_res_blocks=1,
        temperal_downsample=[False] * 5,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    return vae.eval()


def _make_transformer() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    for parameter in transformer.parameters():
        if not parameter.any():
            parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    return transformer.eval()


def write_qwen_edit(folder: Path) -> Path:
    """A pipeline as `save_pretrained` leaves it."""
    tokenizer = _make_tokenizer()
    QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_make_vae(),
        text_encoder=_make_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=_make_processor(tokenizer),
        transformer=_make_transformer(),
    ).save_pretrained(folder)
    return folder
