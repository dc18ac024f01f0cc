"""The loading of the model that is evaluated, of whichever kind it is."""

from typing import Any

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import check_sample, record_sample
from harmonica.execution.levels import warm_ups
from harmonica.models.loading import load_model
from harmonica.models.vae import draws_pixels
from harmonica.samplers import make_sampler

from ..config.workflow import WorkflowConfig
from ..data.rows import Rows
from ..data.stream import sample_spec
from .evaluated_model import EvaluatedModel
from .variants import Variant


def open_model(config: WorkflowConfig, device: torch.device) -> EvaluatedModel:
    """Load the configured model to be evaluated.

    Raises:
        ValueError: it cannot be loaded.
    """
    if config.pipeline.enabled:
        from .pipeline_model import PipelineModel  # diffusers' pipelines take seconds to import

        return PipelineModel(config, device)
    return BranchedModel(config, device)


class BranchedModel(EvaluatedModel):
    """A model with a branch file: DiT, PixArt or Sana."""

    def __init__(self, config: WorkflowConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.loaded = load_model(config.model, device)
        self.model = self.loaded.model
        self.draws_pixels = draws_pixels(self.model)
        self.class_names = self.loaded.class_names
        self.warm_ups = warm_ups(self.model)

    def rows(self, seed: int) -> Rows:
        return sample_spec(self.config, self.model, seed)

    def sample(self, variant: Variant, batch: Any) -> Tensor:
        return variant.sample(self.model, batch)

    def load_vae(self) -> Any:
        return self.loaded.load_vae(self.device)

    def branch_names(self, artifact: RouterArtifact) -> tuple[str, ...]:
        return tuple(branch.name for branch in self.model.branches)

    def record_sample(self, artifact: RouterArtifact) -> RouterArtifact:
        return record_sample(artifact, make_sampler(self.model, artifact.sampler))

    def check_sample(self, artifact: RouterArtifact) -> None:
        artifact.check(self.model, self.config.sampler)
        check_sample(artifact, make_sampler(self.model, artifact.sampler))
