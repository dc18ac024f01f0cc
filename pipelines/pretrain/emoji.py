"""Train the built-in colour DiT on emoji pictures with Ray Train.

    (cd FOLDER && npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0)
    python -m pipelines.pretrain.emoji --data-folder FOLDER
    python -m pipelines.pretrain.emoji --export harmonica/builtin/emoji-dit

As in `pipelines.pretrain.dit`, the second command resumes where its run stopped, and the third writes the
EMA weights of the last checkpoint. The second takes 80 minutes of two CPU cores that have bfloat16.
"""

import logging
from dataclasses import field, replace
from pathlib import Path

import numpy as np
import tyro
from torch import Tensor

from harmonica.models.dit.config import DiTConfig
from harmonica.validation.settings import Count, settings

from . import emoji_data
from .dit import FASHION_DIT, DiTPretrainConfig, LabelTask, export
from .learning import NoisyBatch, distillation_loss
from .loop import run

logger = logging.getLogger(__name__)

EMOJI_DIT = replace(
    FASHION_DIT,
    sample_size=emoji_data.SIDE,
    in_channels=3,
    out_channels=3,
    num_embeds_ada_norm=len(emoji_data.CLASS_NAMES),
)


@settings()
class EmojiPretrainConfig(DiTPretrainConfig):
    """Settings with which the colour model is trained."""

    run_id: str = "emoji-dit"
    """Names the run; the same id resumes it."""
    data_folder: str = "."
    """Folder with the archives of the two npm packages."""
    model: DiTConfig = field(default_factory=lambda: EMOJI_DIT)
    """Shape of the denoiser."""
    batch_size: Count = 64
    """Global batch."""
    steps: Count = 11_500
    """Optimiser steps in all."""
    decay_steps: Count = 3500
    """The last of them, over which the learning rate falls to zero."""
    bfloat16: bool = True
    """Multiply in bfloat16 (`torch.autocast`); weights and their averages stay in float32."""


class EmojiTask(LabelTask):
    """Teach a DiT to denoise emoji of the class that it is told."""

    def error(self, predicted_NCHW: Tensor, batch: NoisyBatch) -> Tensor:
        """Add the error of x_0 to that of the noise, from which shapes are learned."""
        of_noise = super().error(predicted_NCHW, batch)
        return of_noise + distillation_loss(predicted_NCHW, batch.noise, batch.timesteps)

    @staticmethod
    def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
        return emoji_data.load_emoji(folder)

    def draw_rows(self, rng: np.random.Generator) -> np.ndarray:
        """Draw rows (batch,), each class as likely."""
        weight = emoji_data.row_weights(self.labels)
        return rng.choice(len(self.labels), size=self.config.batch_size, p=weight / weight.sum())


def main() -> None:
    """Train the colour DiT, or export its last checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(EmojiPretrainConfig, description=__doc__)
    if config.export:
        command = "python -m pipelines.pretrain.emoji"
        logger.info("wrote %s", export(config, emoji_data.CLASS_NAMES, command=command, data=emoji_data.DATA))
    else:
        logger.info("last checkpoint: %s", run(config, EmojiTask))


if __name__ == "__main__":
    main()
