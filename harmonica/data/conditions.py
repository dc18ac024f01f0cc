"""Make the conditions of images as a model takes them: labels or prompts.

Training reads embeddings from a store (`harmonica.data.prompts`); this is for serving and single samplings.
Shapes: N rows, S text tokens, C width of the text encoder.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from harmonica.data.text_encoder import (
    EncoderDtype,
    OverLimit,
    PromptTooLong,
    TextEncoder,
    check_text_encoder,
)
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import LoadedModel
from harmonica.models.text_condition import TextCondition

_CACHED_PROMPTS = 128
"""Number of prompts whose embeddings are kept, 2.4 MB each at 300 tokens of width 4096."""


class Conditions(Protocol):
    """Makes the conditions of batches."""

    def check(self, subject: int | str, negative_prompt: str) -> None:
        """Prepare a row before its batch, or refuse it; any thread may call this.

        Raises:
            PromptTooLong: the prompt is over the limit, and such prompts are refused.
        """
        ...

    def of(self, subjects: Sequence[int | str], negative_prompts: Sequence[str]) -> Tensor | TextCondition:
        """Return the condition of N images: labels (N,), or a `TextCondition`."""
        ...


class Labels:
    """Makes the conditions of a class-conditional model, which are labels."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = device

    def check(self, subject: int | str, negative_prompt: str) -> None:
        """Accept any row; a label needs no preparation."""

    def of(self, subjects: Sequence[int | str], negative_prompts: Sequence[str]) -> Tensor:
        """Return the labels (N,)."""
        return torch.tensor(subjects, device=self._device)


class Prompts:
    """Makes the conditions of a text-to-image model; keeps the last embeddings.

    A prompt is embedded alone, so that its embedding does not depend on who asked at the same time.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        model: BranchedTransformer,
        *,
        over_limit: OverLimit = "truncate",
        cached: int = _CACHED_PROMPTS,
    ) -> None:
        self._encoder, self._over_limit, self._cached = encoder, over_limit, cached
        self._width, self._max_tokens = model.text_shape()
        self._pixels = model.size_conditioning()
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        if encoder.width != self._width:
            raise ValueError(
                f"the text encoder in {encoder.folder} gives width {encoder.width} and the model takes "
                f"{self._width}: use the encoder of the model's own pipeline"
            )

    def check(self, subject: int | str, negative_prompt: str) -> None:
        """Embed the prompts of a row and keep their embeddings.

        Raises:
            PromptTooLong: names the field that is over the limit, where such prompts are refused.
        """
        for name, prompt in (("prompt", str(subject)), ("negative_prompt", negative_prompt)):
            try:
                self._embedded(prompt)
            except PromptTooLong as error:
                message = f"{name} has {error.tokens} tokens, the model reads {self._max_tokens}: shorten it"
                raise PromptTooLong(message, error.tokens, name) from error

    def of(self, subjects: Sequence[int | str], negative_prompts: Sequence[str]) -> TextCondition:
        """Return the embeddings of N prompts and N negative prompts."""
        positive = [self._embedded(str(prompt)) for prompt in subjects]
        negative = [self._embedded(prompt) for prompt in negative_prompts]
        sizes: dict[str, Tensor] = {}
        if self._pixels is not None:
            device, (height, width) = positive[0][0].device, self._pixels
            sizes["resolution"] = torch.tensor([[height, width]] * len(positive), device=device).float()
            sizes["aspect_ratio"] = torch.full((len(positive), 1), height / width, device=device)
        return TextCondition(
            embeddings=torch.stack([embedding for embedding, _ in positive]),
            mask=torch.stack([mask for _, mask in positive]),
            negative_embeddings=torch.stack([embedding for embedding, _ in negative]),
            negative_mask=torch.stack([mask for _, mask in negative]),
            **sizes,
        )

    def _embedded(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Return the embedding (S, C) and the mask (S,) of a prompt."""
        with self._lock:
            if prompt not in self._kept:
                embeddings, mask = self._encoder.encode([prompt], self._max_tokens, self._over_limit)
                self._kept[prompt] = embeddings[0], mask[0]
                if len(self._kept) > self._cached:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(prompt)
            return self._kept[prompt]


def make_conditions(
    loaded: LoadedModel,
    device: str | torch.device,
    *,
    over_limit: OverLimit = "truncate",
    dtype: EncoderDtype = "bfloat16",
) -> Conditions:
    """Return a loaded model's conditions, with its text encoder if it needs one.

    Raises:
        ValueError: the model takes prompts and has no text encoder.
    """
    if loaded.model.num_classes:
        return Labels(device)
    encoder = TextEncoder.load(text_folder_of(loaded), device, dtype)
    return Prompts(encoder, loaded.model, over_limit=over_limit)


def check_conditions(loaded: LoadedModel) -> None:
    """Check that `make_conditions` can work, without loading a text encoder.

    Raises:
        ValueError: the model takes prompts, and what embeds them is missing, incomplete or another model's.
    """
    if not loaded.model.num_classes:
        check_text_encoder(text_folder_of(loaded), loaded.model.text_shape()[0])


def text_folder_of(loaded: LoadedModel) -> Path:
    """Return the folder with the text encoder of a model that takes prompts.

    Raises:
        ValueError: the model has none.
    """
    if loaded.text_folder is None:
        raise ValueError(
            "model.path has no text_encoder/ and tokenizer/ and the model takes prompts: give the folder of "
            "its whole pipeline"
        )
    return loaded.text_folder
