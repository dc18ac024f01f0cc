"""The built-in text-to-image model, which is a small PixArt on pixels.

Its text encoder is a T5 with the vocabulary of the captions. The model lies in `builtin/fashion-pixart` as
a diffusers pipeline's folder without VAE; `pipelines.pretrain.text_to_image` made it. Shapes: N batch, C
channels, H W image, S text tokens.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor, nn

from harmonica.evaluation.fashion_captions import all_captions
from harmonica.models.dit.model import DiT
from harmonica.models.loading import BUILTIN, ModelConfig, load_model
from harmonica.torchvision_ops import ensure_torchvision_imports

from .warm_start import warm_start

ensure_torchvision_imports()

from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel  # noqa: E402

if TYPE_CHECKING:  # sampling with embedded prompts does not need it installed
    from transformers import T5EncoderModel, T5Tokenizer

TEXT_TOKENS, TEXT_WIDTH = 16, 64
UNKNOWN, WORD = "<unk>", "\u2581"  # T5's mark of where a word begins
SPECIAL = ("<pad>", "</s>", UNKNOWN)  # ids 0, 1, 2, as T5 has them


def make_tokenizer() -> "T5Tokenizer":
    """Make a tokenizer with one token for each word of the captions.

    Other words are unknown.
    """
    from transformers import T5Tokenizer

    words = sorted({word for text in all_captions() for word in text.split()})
    pieces = [(name, 0.0) for name in SPECIAL] + [(WORD + word, -1.0) for word in words]
    return T5Tokenizer(
        vocab=[*pieces, (WORD, -2.0)], extra_ids=0, model_max_length=TEXT_TOKENS, padding_side="right"
    )


def tokenize(tokenizer: "T5Tokenizer", texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask (N, S) as PixArt's pipeline does."""
    tokens = tokenizer(
        texts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"]


class TextToImage(nn.Module):
    """A denoiser and its text encoder, trained together."""

    def __init__(self, transformer: PixArtTransformer2DModel, text_encoder: "T5EncoderModel") -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(self, noisy_NCHW: Tensor, timestep_N: Tensor, ids_NS: Tensor, mask_NS: Tensor) -> Tensor:
        """Return the predicted noise (N, C, H, W)."""
        text_NSC = self.text_encoder(input_ids=ids_NS, attention_mask=mask_NS).last_hidden_state
        predicted_NCHW: Tensor
        (predicted_NCHW,) = self.transformer(
            noisy_NCHW,
            encoder_hidden_states=text_NSC,
            timestep=timestep_N,
            encoder_attention_mask=mask_NS,
            return_dict=False,
        )
        return predicted_NCHW


def load_dit(start: str) -> DiT:
    """Load the model to start from, frozen.

    Raises:
        ValueError: the model is no DiT.
    """
    dit = load_model(ModelConfig(path=start)).model
    if not isinstance(dit, DiT):
        raise ValueError(f"start {start} is a {type(dit).__name__}: give a DiT, such as {BUILTIN}")
    return dit


def make_model(start: str, seed: int) -> TextToImage:
    """Make a PixArt that is warm-started from the DiT `start`.

    It has the DiT's shape, and a new text encoder.
    """
    from transformers import T5Config, T5EncoderModel

    dit = load_dit(start)
    shape = dit.config
    text = T5Config(
        vocab_size=len(make_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=TEXT_WIDTH // 4,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=shape.num_attention_heads,
            attention_head_dim=shape.attention_head_dim,
            in_channels=shape.in_channels,
            out_channels=shape.out_channels,
            num_layers=shape.num_layers,
            cross_attention_dim=shape.hidden_size,
            caption_channels=TEXT_WIDTH,
            sample_size=shape.sample_size,
            patch_size=shape.patch_size,
            interpolation_scale=1,
            use_additional_conditions=False,
        )
        model = TextToImage(transformer, T5EncoderModel(text))
    warm_start(transformer, dit)
    return model


def save_pipeline(model: TextToImage, folder: Path) -> None:
    """Save the folder of a diffusers `PixArtAlphaPipeline`.

    The denoiser is saved in half precision. The text encoder stays in float32: it is small, and
    transformers loads the precision it finds.
    """
    scheduler = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", algorithm_type="dpmsolver++", solver_order=2
    )
    model.transformer.half().save_pretrained(folder / "transformer")
    model.text_encoder.save_pretrained(folder / "text_encoder")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "PixArtAlphaPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
