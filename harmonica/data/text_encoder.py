"""Embed prompts by a PixArt pipeline's T5, as diffusers' `encode_prompt` does.

Embeddings are made once (`pipelines.data.embed_prompts`) and then read, so that no training of a router
loads the encoder. Shapes: N prompts, S max_tokens, C width of the encoder.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from harmonica.io.repository_files import ENCODER_STEMS
from harmonica.io.safe_load import read_tensors
from harmonica.io.weight_files import contents, find_weights
from harmonica.models.fingerprint import FINGERPRINT_VALUES, weights_fingerprint
from harmonica.torchvision_ops import ensure_torchvision_imports
from harmonica.validation.extras import need
from harmonica.validation.finite import check_finite

logger = logging.getLogger(__name__)

OverLimit = Literal["truncate", "refuse"]
EncoderDtype = Literal["float32", "bfloat16", "float16"]

_SHAPE = ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "feed_forward_proj")
_WORDS = ("tokenizer.json", "spiece.model")  # a tokenizer has either, or both
# Says how text becomes tokens, whichever of its formats the tokenizer is stored in.
_PROBE = "a photo of 2 cats, 3/4 view; it's café № 5 - 猫 🙂 <b>\ttab</b>"


def preprocess(prompt: str) -> str:
    """Preprocess a prompt as diffusers does without `clean_caption`."""
    return prompt.lower().strip()


def load_tokenizer(folder: Path) -> Any:
    """Load the T5 tokenizer of a pipeline's folder.

    Raises:
        ValueError: the folder has none.
    """
    part = _part(folder, "tokenizer", "tokenizer_config.json")
    if not any((part / words).is_file() for words in _WORDS):
        raise ValueError(
            f"model.path {folder} has no tokenizer/{' or '.join(_WORDS)}; tokenizer/ holds {contents(part)}: "
            "fetch the tokenizer again"
        )
    need("transformers", extra="diffusers")
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(part, local_files_only=True)


def token_counts(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Return untruncated prompts' numbers of tokens, each with its end token."""
    if not prompts:
        return []
    # verbose: the tokenizer's own limit says nothing of the model's.
    return [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]


def check_text_encoder(folder: Path, width: int) -> None:
    """Check that a pipeline's folder has all that `TextEncoder.load` reads.

    No weights are loaded.

    Args:
        width: of the embeddings that the model takes.

    Raises:
        ValueError: a part is missing or incomplete, is no T5's, or is of another width.
    """
    load_tokenizer(folder)
    config = _config(folder)
    find_weights(folder / "text_encoder", ENCODER_STEMS)
    if config.d_model != width:
        raise ValueError(
            f"the text encoder in {folder} gives width {config.d_model} and the model takes {width}: use the "
            "encoder of the model's own pipeline"
        )


class PromptTooLong(ValueError):
    """Raised for a prompt that has more tokens than the model reads.

    Args:
        message: the whole message.
        tokens: number of tokens of the prompt.
        field: name of the request's field that has the prompt; empty if it does not come from a request.
    """

    def __init__(self, message: str, tokens: int, field: str = "") -> None:
        super().__init__(message, tokens, field)
        self.message, self.tokens, self.field = message, tokens, field

    def __str__(self) -> str:
        return self.message


def over_limit_message(prompt: str, tokens: int, many: int, total: int, max_tokens: int) -> str:
    """Return the message about too long prompts; `prompt` is the first of them."""
    shown = prompt if len(prompt) <= 60 else f"{prompt[:60]}..."
    return f"{many} of {total} prompts have more than {max_tokens} tokens, the first {tokens}: {shown!r}"


def encoder_identity(folder: Path, max_tokens: int) -> dict[str, Any]:
    """Return as JSON values what embeddings depend on, without loading weights.

    Precision is no part of it, nor is the format that weights and tokenizer are stored in.
    """
    tokenizer, config = load_tokenizer(folder), _config(folder)
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(json.dumps(tokenizer(preprocess(_PROBE), verbose=False)["input_ids"]).encode())
    first_values = {}
    for file in find_weights(folder / "text_encoder", ENCODER_STEMS).files:
        for name, tensor in read_tensors(folder / "text_encoder" / file).items():
            # One tensor under two names, of which files have either or both; decoders are left alone.
            name = name.replace("encoder.embed_tokens.", "shared.")
            if name.startswith(("encoder.", "shared.")):
                first_values[name] = tensor.flatten()[:FINGERPRINT_VALUES].clone()
    return {
        **{name: getattr(config, name) for name in _SHAPE},
        "weights": weights_fingerprint(first_values),
        "tokenizer": f"sha256:{digest.hexdigest()[:16]}",
        "max_tokens": max_tokens,
    }


class TextEncoder:
    """Embeds prompts by a frozen T5 encoder and its tokenizer."""

    def __init__(self, folder: Path, tokenizer: Any, model: Any) -> None:
        self.folder, self.tokenizer, self.model = folder, tokenizer, model

    @classmethod
    def load(
        cls, folder: Path, device: str | torch.device = "cpu", dtype: EncoderDtype = "bfloat16"
    ) -> "TextEncoder":
        """Load the encoder from `tokenizer/` and `text_encoder/` of a pipeline's folder.

        Raises:
            ValueError: a part is missing, or is not of a T5.
        """
        tokenizer = load_tokenizer(folder)
        _config(folder)
        weights = find_weights(folder / "text_encoder", ENCODER_STEMS)
        from transformers import T5EncoderModel

        model = T5EncoderModel.from_pretrained(
            folder / "text_encoder",
            dtype=getattr(torch, dtype),
            variant=weights.variant or None,
            use_safetensors=weights.is_safe,
            local_files_only=True,
        )
        return cls(folder, tokenizer, model.eval().requires_grad_(False).to(device))

    @property
    def width(self) -> int:
        """Return the width C of the embeddings."""
        return int(self.model.config.d_model)

    def identity(self, max_tokens: int) -> dict[str, Any]:
        """Return the `encoder_identity` of this encoder."""
        return encoder_identity(self.folder, max_tokens)

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], max_tokens: int, over_limit: OverLimit = "truncate"
    ) -> tuple[Tensor, Tensor]:
        """Return the embeddings (N, S, C) and the mask (N, S) bool of prompts.

        Both are on the encoder's device, the embeddings in its precision.

        As in diffusers, padding has embeddings too, which attention has to mask.

        Args:
            max_tokens: S; PixArt-alpha's pipeline pads to 120, PixArt-Sigma's to 300.
            over_limit: whether longer prompts are truncated, with one warning a call, or refused.

        Raises:
            ValueError: there are no prompts.
            PromptTooLong: a prompt is over the limit, and `over_limit` refuses it.
            NotFinite: an embedding is not finite.
        """
        if not prompts:
            raise ValueError("prompts is []: give at least one")
        texts = [preprocess(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=max_tokens,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        full = tokens.attention_mask.sum(1).eq(max_tokens).nonzero().flatten().tolist()
        self._check_lengths([texts[row] for row in full], len(texts), max_tokens, over_limit)
        device = self.model.device
        mask = tokens.attention_mask.to(device)
        embeddings = self.model(tokens.input_ids.to(device), attention_mask=mask)[0]
        dtype = str(embeddings.dtype).removeprefix("torch.")
        check_finite(
            embeddings,
            f"embeddings of the text encoder in {self.folder} are",
            f"it runs in {dtype}, whose range a T5 may leave: give prompts.dtype bfloat16 or float32, or "
            "fetch its weights again",
        )
        return embeddings, mask.bool()

    def _check_lengths(self, full: list[str], total: int, max_tokens: int, over_limit: OverLimit) -> None:
        """Warn of prompts that were truncated, or refuse them."""
        if not full:
            return
        over = [pair for pair in zip(full, token_counts(self.tokenizer, full)) if pair[1] > max_tokens]
        if not over:
            return
        if over_limit == "refuse":
            words = over_limit_message(*over[0], len(over), total, max_tokens)
            raise PromptTooLong(f"{words}: shorten them, or set prompts.over_limit to truncate", over[0][1])
        # Without their words: they may be a client's, which are not logged.
        logger.warning(
            "%d of %d prompts have more than %d tokens, the first %d; they lose their end",
            *(len(over), total, max_tokens, over[0][1]),
        )


def _part(folder: Path, name: str, needed: str) -> Path:
    """Return a subfolder; refuse a missing one, which would be taken for a hub id."""
    if not (folder / name / needed).is_file():
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        raise ValueError(
            f"model.path {folder} has no {name}/{needed}; it holds {', '.join(held) or 'nothing'}: give the "
            "folder of a PixArt pipeline with tokenizer/ and text_encoder/"
        )
    return folder / name


def _config(folder: Path) -> Any:
    part = _part(folder, "text_encoder", "config.json")
    kind = json.loads((part / "config.json").read_text()).get("model_type")
    if kind != "t5":
        raise ValueError(f"model.path {folder} has a text_encoder of type {kind}: give a PixArt's, a T5")
    ensure_torchvision_imports()  # transformers imports torchvision wherever it is installed
    need("transformers", extra="diffusers")
    from transformers import T5Config

    return T5Config.from_pretrained(part, local_files_only=True)
