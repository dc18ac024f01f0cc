"""Define what trainings on captions share: settings, and the captions drawn."""

from typing import Annotated, Any, TypeVar

import numpy as np
import torch

from harmonica.evaluation.fashion_captions import caption, tones
from harmonica.models.loading import BUILTIN
from harmonica.validation.settings import Count, Field, settings

from .learning import drop
from .task import PretrainConfig, Task
from .text_model import load_dit


@settings()
class CaptionedConfig(PretrainConfig):
    """Settings of a training on captions that starts from a DiT and follows it."""

    start: str = BUILTIN
    """DiT to start from: its shape is the new model's."""
    tone_share: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Of the captions of dark or light pictures, those that say so."""
    teacher_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of following the DiT, beside what is learned from the images, where no tone is asked for. The class
    weighs so little in the error of the noise that learning it from that alone takes several times as long; 0
    does."""
    judge: str = ""
    """Evaluate the images of this folder's model instead of training."""
    samples: Count = 1000
    """Images of that evaluation, under each guidance scale."""


Config = TypeVar("Config", bound=CaptionedConfig)


class CaptionedTask(Task[Config]):
    """Teach a model to denoise images of the caption that it is told."""

    def __init__(self, config: Config, images: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(config, images, labels)
        self.tones: Any = tones(images, labels)
        self.teacher = load_dit(config.start)

    def captions(self, rows: np.ndarray, generator: torch.Generator) -> list[str]:
        """Return a caption of each row's image; some are left empty."""
        is_dropped = drop(len(rows), self.config.condition_dropout, generator)
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        says_tone = rng.random(len(rows)) < self.config.tone_share
        return [
            "" if dropped else caption(int(self.labels[row]), self.tones[row] if says else None, rng)
            for row, dropped, says in zip(rows, is_dropped.tolist(), says_tone)
        ]
