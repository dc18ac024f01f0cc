"""Train the built-in class-conditional DiT on Fashion-MNIST with Ray Train.

    python -m pipelines.pretrain.dit --run-id fashion-dit --storage-path runs/pretrain
    python -m pipelines.pretrain.dit --run-id fashion-dit --export harmonica/builtin/fashion-dit

The first command trains, checkpoints every minute and, given the same run id again, goes on where
it stopped; the second writes the EMA weights of the last checkpoint as the built-in model.
"""

import logging
from collections.abc import Callable
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from harmonica.evaluation import fashion_mnist
from harmonica.io.paths import local
from harmonica.io.tensor_files import write_tensors
from harmonica.models.dit.config import DiTConfig
from harmonica.models.dit.model import DiT
from harmonica.models.loading import write_folder_config
from harmonica.validation.settings import settings

from .learning import NoisyBatch, drop
from .loop import DATA, last_state, provenance, run
from .task import PretrainConfig, Task

logger = logging.getLogger(__name__)

FASHION_DIT = DiTConfig(
    sample_size=28,
    patch_size=4,
    in_channels=1,
    out_channels=1,
    num_layers=12,
    num_attention_heads=4,
    attention_head_dim=32,
    num_embeds_ada_norm=10,
)


@settings()
class DiTPretrainConfig(PretrainConfig):
    """Settings with which the built-in class-conditional model is trained."""

    model: DiTConfig = field(default_factory=lambda: FASHION_DIT)
    """Shape of the denoiser."""


class LabelTask(Task[DiTPretrainConfig]):
    """Teach a DiT to denoise images of the class that it is told."""

    def make_model(self) -> DiT:
        """Return the DiT with its initial weights."""
        model = DiT(self.config.model)
        model.initialize(torch.Generator().manual_seed(self.config.seed))
        return model

    def loss(
        self,
        forward: Callable[..., Tensor],
        clean_NCHW: Tensor,
        rows: np.ndarray,
        generator: torch.Generator,
    ) -> Tensor:
        """Return the mean squared error of the predicted noise, with classes dropped."""
        batch = NoisyBatch.draw(clean_NCHW, generator)
        label_N = torch.from_numpy(self.labels[rows])
        is_dropped = drop(len(rows), self.config.condition_dropout, generator)
        label_N[is_dropped] = self.config.model.num_embeds_ada_norm  # the null class
        predicted = forward(batch.images, batch.timesteps, label_N.to(clean_NCHW.device))
        return self.error(predicted, batch)

    def error(self, predicted_NCHW: Tensor, batch: NoisyBatch) -> Tensor:
        """Return the mean squared error of the predicted noise (N, C, H, W)."""
        return (predicted_NCHW - batch.noise).square().mean()


def export(
    config: DiTPretrainConfig,
    class_names: tuple[str, ...] = fashion_mnist.CLASS_NAMES,
    *,
    command: str = "python -m pipelines.pretrain.dit",
    data: str = DATA,
) -> Path:
    """Write the EMA weights of the last checkpoint, and the config beside them.

    They are in half precision.
    """
    state = last_state(config)
    target = local(config.export, "export")
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: p.to(torch.float16).contiguous() for name, p in state["ema"].items()}
    write_tensors(weights, target / "model.safetensors")
    write_folder_config(
        target,
        config.model,
        class_names,
        command=command,
        **provenance(config, state["step"], data),
    )
    return target


def main() -> None:
    """Train the built-in DiT, or export its last checkpoint."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = tyro.cli(DiTPretrainConfig, description=__doc__)
    if config.export:
        logger.info("wrote %s", export(config))
    else:
        logger.info("last checkpoint: %s", run(config, LabelTask))


if __name__ == "__main__":
    main()
