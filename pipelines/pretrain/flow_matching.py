"""Train the flow-matching SD3 transformer on captions, with Ray Train.

Images and captions are those of Fashion-MNIST.

    python -m pipelines.pretrain.flow_matching --storage-path runs/pretrain
    python -m pipelines.pretrain.flow_matching --export pipelines/pretrain/fashion-sd3
    python -m pipelines.pretrain.flow_matching --judge pipelines/pretrain/fashion-sd3

Its image stream starts from the built-in DiT, which it also follows where a caption names the class alone;
captions are embedded by the built-in PixArt's text encoder, which stays as it is. As in
`pipelines.pretrain.text_to_image`, the first command resumes, the second writes the EMA weights and the third
evaluates what was written. Shapes: N batch, C channels, H W image.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from harmonica.builtin import FASHION_PIXART
from harmonica.data.text_encoder import TextEncoder
from harmonica.evaluation.fashion_captions import meaning
from harmonica.io.paths import local
from harmonica.validation.settings import Count, Positive, settings

from .captioned import CaptionedConfig, CaptionedTask
from .evaluate_flow_model import evaluate_flow_model
from .flow_model import (
    FlowBatch,
    FlowModel,
    embed_captions,
    make_flow_model,
    save_flow_pipeline,
    teacher_velocity,
)
from .loop import last_state, provenance, run

logger = logging.getLogger(__name__)


@settings()
class FlowPretrainConfig(CaptionedConfig):
    """The settings of the training of the flow-matching model."""

    run_id: str = "fashion-sd3"
    """Names the run; the same id resumes it."""
    num_workers: Count = 1
    """Data-parallel workers, one core each."""
    batch_size: Count = 48
    """Global batch."""
    steps: Count = 850
    """Optimiser steps in all."""
    decay_steps: Count = 300
    """The last of them, over which the learning rate falls to zero."""
    warmup_steps: Count = 50
    """The first of them, over which it rises."""
    learning_rate: Positive = 1.5e-3
    """Peak learning rate."""


class FlowTask(CaptionedTask[FlowPretrainConfig]):
    """An SD3 transformer that is told a caption."""

    def __init__(self, config: FlowPretrainConfig, images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(config, images, labels)
        self.encoder = TextEncoder.load(FASHION_PIXART, dtype="float32")

    def make_model(self) -> FlowModel:
        return make_flow_model(self.config.start, self.config.seed)

    def loss(
        self,
        forward: Callable[..., Tensor],
        clean_NCHW: Tensor,
        rows: np.ndarray,
        generator: torch.Generator,
    ) -> Tensor:
        batch, device = FlowBatch.draw(clean_NCHW, generator), clean_NCHW.device
        texts = self.captions(rows, generator)
        embedded = embed_captions(self.encoder, texts)
        predicted = forward(
            batch.images,
            embedded["prompt_embeds"].to(device),
            embedded["pooled_prompt_embeds"].to(device),
            batch.timesteps,
        )
        loss = (predicted - batch.velocity).square().mean()
        plain = [i for i, text in enumerate(texts) if not text or meaning(text)[1] is None]
        if not plain or not self.config.teacher_weight:
            return loss
        labels = [int(self.labels[rows[i]]) if texts[i] else self.teacher.num_classes for i in plain]
        taught = teacher_velocity(self.teacher.to(device), batch, torch.tensor(labels, device=device), plain)
        following = (predicted[plain] - taught).square().mean() * len(plain) / len(rows)
        return loss + self.config.teacher_weight * following


def export(config: FlowPretrainConfig) -> Path:
    """Write the last checkpoint's EMA weights and provenance as a pipeline's folder."""
    state, folder = last_state(config), local(config.export, "export")
    model = make_flow_model(config.start, config.seed)
    model.load_state_dict(state["ema"], strict=False)  # the positions are no parameter
    save_flow_pipeline(model, folder)
    about = provenance(config, state["step"])
    own = {name: getattr(config, name) for name in ("start", "tone_share", "teacher_weight")}
    about = {
        "command": "python -m pipelines.pretrain.flow_matching",
        **about,
        "training": about["training"] | own,
    }
    (folder / "training.json").write_text(json.dumps(about, indent=1) + "\n")
    return folder


def main() -> None:
    """Train the SD3 transformer, export its last checkpoint, or evaluate one."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(FlowPretrainConfig, description=__doc__)
    if config.export:
        logger.info("wrote %s", export(config))
    elif config.judge:
        report = evaluate_flow_model(local(config.judge, "judge"), config.samples, seed=config.seed)
        logger.info("%s", json.dumps(report, indent=1))
    else:
        logger.info("last checkpoint: %s", run(config, FlowTask))


if __name__ == "__main__":
    main()
