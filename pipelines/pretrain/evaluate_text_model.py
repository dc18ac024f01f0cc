"""Evaluate whether the built-in model's images show what captions ask for.

Shapes: N images, C channels, H W image.
"""

import itertools
import json
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor

from harmonica.builtin import CLASSIFIER
from harmonica.core.sampling import sample
from harmonica.data.text_encoder import TextEncoder
from harmonica.evaluation import fashion_captions as captions
from harmonica.evaluation import fashion_mnist
from harmonica.evaluation.classifier import (
    STATISTICS_FILE,
    features_and_logits,
    load_classifier,
)
from harmonica.evaluation.feature_statistics import FeatureStatistics
from harmonica.evaluation.image_metrics import frechet_distance, label_accuracy
from harmonica.evaluation.plots import sample_sheet, to_uint8
from harmonica.models.base import freeze
from harmonica.models.pixart.model import PixArt
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import SamplerConfig, make_sampler

from .text_model import TEXT_TOKENS

GUIDANCE_SCALES = (4.5, 2.0)  # PixArt's own, and that of the built-in DiT
NUM_STEPS = 20
_BATCH = 100


class CaptionSampler(Protocol):
    """Samples images of captions."""

    def sample_images(self, prompts: list[str], guidance_scale: float, seed: int) -> Tensor:
        """Return images (N, C, H, W), about in [-1, 1]."""
        ...


class TextToImageSampler:
    """Samples images from a pipeline's folder that has no VAE.

    The scheduler is that of the folder.
    """

    def __init__(self, folder: Path) -> None:
        transformer = PixArtTransformer2DModel.from_pretrained(folder / "transformer", local_files_only=True)
        self.model = PixArt(transformer.float(), text_tokens=TEXT_TOKENS)
        freeze(self.model)
        self.encoder = TextEncoder.load(folder, dtype="float32")
        self.scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())

    def sample_images(self, prompts: list[str], guidance_scale: float, seed: int) -> Tensor:
        """Return images (N, C, H, W), about in [-1, 1]."""
        config = SamplerConfig(
            name="diffusers",
            scheduler=self.scheduler,
            num_inference_steps=NUM_STEPS,
            guidance_scale=guidance_scale,
        )
        sampler = make_sampler(self.model, config)
        side, channels = self.model.sample_size, self.model.in_channels
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(prompts), channels, side, side, generator=generator)
        batches = []
        for first in range(0, len(prompts), _BATCH):
            rows = slice(first, first + _BATCH)
            batches.append(sample(sampler, noise[rows], self._condition(prompts[rows])))
        return torch.cat(batches)

    def _condition(self, prompts: list[str]) -> TextCondition:
        embeddings, mask = self.encoder.encode(prompts, TEXT_TOKENS)
        negative, negative_mask = self.encoder.encode([""], TEXT_TOKENS)
        n = len(prompts)
        return TextCondition(
            embeddings=embeddings,
            mask=mask,
            negative_embeddings=negative.expand(n, -1, -1),
            negative_mask=negative_mask.expand(n, -1),
        )


def random_captions(count: int, seed: int) -> list[str]:
    """Draw captions of all classes in turn; about half of them ask for a tone."""
    rng = np.random.default_rng(seed)
    asked: tuple[captions.Tone | None, ...] = (None, None, "dark", "light")
    return [
        captions.caption(i % len(captions.NOUNS), asked[rng.integers(len(asked))], rng) for i in range(count)
    ]


def caption_metrics(images_NCHW: Tensor, prompts: list[str]) -> dict[str, float]:
    """Return class and tone accuracy and the Frechet distance to test images."""
    images_NCHW = images_NCHW.clamp(-1, 1)
    meant = [captions.meaning(prompt) for prompt in prompts]
    labels = np.array([label for label, _ in meant])
    features, logits = features_and_logits(load_classifier(), images_NCHW)
    pixels = to_uint8(images_NCHW).transpose(0, 3, 1, 2)
    toned = [i for i, (_, tone) in enumerate(meant) if tone]
    is_right = captions.is_of_tone(pixels[toned], labels[toned], [tone for _, tone in meant if tone])
    test = FeatureStatistics.load(CLASSIFIER / STATISTICS_FILE)
    return {
        "label_accuracy": label_accuracy(logits, torch.from_numpy(labels)),
        "tone_accuracy": float(is_right.mean()),
        "frechet_to_test": frechet_distance(FeatureStatistics.from_features(features), test),
    }


def evaluate_text_model(folder: Path, count: int, *, seed: int = 0) -> dict[str, Any]:
    """Evaluate a folder's model and write `report.json` and `samples.png` there."""
    return write_evaluation(TextToImageSampler(folder), folder, count, seed=seed)


def write_evaluation(sampler: CaptionSampler, folder: Path, count: int, *, seed: int) -> dict[str, Any]:
    """Evaluate what samples images of captions, and write the report and a sheet."""
    prompts = random_captions(count, seed)
    report: dict[str, Any] = {"samples": count, "steps": NUM_STEPS, "seed": seed, "guidance": {}}
    for scale in GUIDANCE_SCALES:
        report["guidance"][f"{scale:g}"] = caption_metrics(
            sampler.sample_images(prompts, scale, seed), prompts
        )
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    rows = {}
    for scale, tone in itertools.product(GUIDANCE_SCALES, (None, *get_args(captions.Tone))):
        sheet = [captions.plain_caption(label, tone) for label in range(len(captions.NOUNS))]
        rows[f"{tone or 'no tone'}\nguidance {scale:g}"] = sampler.sample_images(sheet, scale, seed)
    sample_sheet(rows, fashion_mnist.CLASS_NAMES, folder / "samples.png")
    return report
