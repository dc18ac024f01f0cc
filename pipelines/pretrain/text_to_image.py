"""Train the built-in PixArt on captions of Fashion-MNIST with Ray Train.

    python -m pipelines.pretrain.text_to_image --storage-path runs/pretrain
    python -m pipelines.pretrain.text_to_image --export harmonica/builtin/fashion-pixart
    python -m pipelines.pretrain.text_to_image --judge harmonica/builtin/fashion-pixart

It starts from the built-in DiT, and learns its small text encoder with it. As in `pipelines.pretrain.dit`,
the first command resumes where its run stopped and the second writes the EMA weights of the last
checkpoint. The third samples from what was written and leaves a report and pictures beside it.
Shapes: N batch, C channels, H W image, S text tokens.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

from harmonica.evaluation.fashion_captions import meaning
from harmonica.io.paths import local
from harmonica.validation.settings import Count, Field, Positive, settings

from .captioned import CaptionedConfig, CaptionedTask
from .evaluate_text_model import evaluate_text_model
from .learning import NoisyBatch, distillation_loss
from .loop import last_state, provenance, run
from .text_model import (
    SPECIAL,
    UNKNOWN,
    WORD,
    TextToImage,
    make_model,
    make_tokenizer,
    save_pipeline,
    tokenize,
)

logger = logging.getLogger(__name__)


@settings()
class TextPretrainConfig(CaptionedConfig):
    """Settings with which the built-in text-to-image model is trained."""

    run_id: str = "fashion-pixart"
    """Names the run; the same id resumes it."""
    steps: Count = 1100
    """Optimiser steps in all."""
    decay_steps: Count = 300
    """The last of them, over which the learning rate falls to zero."""
    warmup_steps: Count = 50
    """The first of them, over which it rises."""
    learning_rate: Positive = 1.5e-3
    """Peak learning rate."""
    unknown_share: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Of the words, those replaced by unknown ones, so that such mean nothing."""


class CaptionTask(CaptionedTask[TextPretrainConfig]):
    """Teach a PixArt to denoise images of the caption that it is told."""

    def __init__(self, config: TextPretrainConfig, images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(config, images, labels)
        self.tokenizer = make_tokenizer()
        # A word that the tokenizer does not have becomes these two: its beginning, and the rest.
        self.unknown = torch.tensor(self.tokenizer.convert_tokens_to_ids([WORD, UNKNOWN]))

    def make_model(self) -> TextToImage:
        """Return the PixArt, started from the built-in DiT."""
        return make_model(self.config.start, self.config.seed)

    def loss(
        self,
        forward: Callable[..., Tensor],
        clean_NCHW: Tensor,
        rows: np.ndarray,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the error of the predicted noise, and of following the teacher."""
        batch = NoisyBatch.draw(clean_NCHW, generator)
        texts = self.captions(rows, generator)
        device = clean_NCHW.device
        tokens = [each.to(device) for each in self._tokens(texts, generator)]
        predicted = forward(batch.images, batch.timesteps, *tokens)
        loss = (predicted - batch.noise).square().mean()
        plain = [i for i, text in enumerate(texts) if not text or meaning(text)[1] is None]
        if not plain or not self.config.teacher_weight:
            return loss
        labels = [int(self.labels[rows[i]]) if texts[i] else self.teacher.num_classes for i in plain]
        images, timesteps = batch.images[plain], batch.timesteps[plain]
        with torch.no_grad():
            taught = self.teacher.to(device)(images, timesteps, torch.tensor(labels, device=device))
        following = distillation_loss(predicted[plain], taught, timesteps) * len(plain) / len(rows)
        return loss + self.config.teacher_weight * following

    def _tokens(self, texts: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return token ids and mask (N, S); some words are replaced by unknown ones."""
        ids_NS, mask_NS = tokenize(self.tokenizer, texts)
        is_lost = torch.rand(ids_NS.shape, generator=generator) < self.config.unknown_share
        is_lost &= ids_NS >= len(SPECIAL)
        ids_NS[is_lost] = self.unknown[torch.randint(2, (int(is_lost.sum()),), generator=generator)]
        return ids_NS, mask_NS


def export(config: TextPretrainConfig) -> Path:
    """Write the EMA weights of the last checkpoint as a pipeline's folder.

    Their provenance is written beside them.
    """
    state, folder = last_state(config), local(config.export, "export")
    model = make_model(config.start, config.seed)
    model.load_state_dict(state["ema"], strict=False)  # without the second name of T5's tied embedding
    save_pipeline(model, folder)
    own = {name: getattr(config, name) for name in ("start", "tone_share", "unknown_share", "teacher_weight")}
    about = provenance(config, state["step"])
    about = {
        "command": "python -m pipelines.pretrain.text_to_image",
        **about,
        "training": about["training"] | own,
    }
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    return folder


def main() -> None:
    """Train the built-in PixArt, export its last checkpoint, or evaluate an export."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(TextPretrainConfig, description=__doc__)
    if config.export:
        logger.info("wrote %s", export(config))
    elif config.judge:
        report = evaluate_text_model(local(config.judge, "judge"), config.samples, seed=config.seed)
        logger.info("%s", json.dumps(report, indent=1))
    else:
        logger.info("last checkpoint: %s", run(config, CaptionTask))


if __name__ == "__main__":
    main()
