"""Evaluate a pipeline: full, with fewer steps, and under `harmonica.apply`."""

import copy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import compare_samples
from harmonica.data.embedding_store import EmbeddingStore
from harmonica.integrations.diffusers_pipeline import apply
from harmonica.integrations.pipeline_folder import PipelineFolder
from harmonica.integrations.recorded.pipelines import transformers_of
from harmonica.pipeline_training.backend import PipelineBatch
from harmonica.pipeline_training.sampling import sample_pipeline
from harmonica.validation.finite import check_finite

from ..config.workflow import WorkflowConfig
from ..data.pipeline_prompts import open_prompts, pipeline_call
from ..data.rows import PipelineRows
from .evaluated_model import EvaluatedModel
from .variants import Variant

_GOLDEN_SEED = 0


class PipelineModel(EvaluatedModel):
    """A pipeline and, for each router, a twin that runs under the plan.

    Twins have the same weights.

    Twins keep what their first call recorded, so that variants can be timed in turn.
    """

    def __init__(self, config: WorkflowConfig, device: torch.device) -> None:
        folder = PipelineFolder.read(config.model.path, config.model.revision)
        self.prompts: EmbeddingStore = open_prompts(config)
        self.pipe = folder.load_denoiser(
            dtype=getattr(torch, config.model.dtype),
            device=device,
            embedded=bool(self.prompts.manifest.names),
        )
        self.call = pipeline_call(config, folder)
        self.draws_pixels = folder.has_vae
        self._twins: dict[str, Any] = {}

    def rows(self, seed: int) -> PipelineRows:
        return PipelineRows(seed, self.prompts)

    def sample(self, variant: Variant, batch: PipelineBatch) -> Tensor:
        if not self.draws_pixels:
            return self._draw(variant, batch, "latent").float().flatten(1)[:, :, None, None]
        return 2 * self._draw(variant, batch, "pt").float() - 1

    def run(self, variant: Variant, batch: PipelineBatch) -> None:
        self._draw(variant, batch, "latent")

    def _draw(self, variant: Variant, batch: PipelineBatch, output_type: str) -> Tensor:
        pipe, call = self.pipe, self.call | {"num_inference_steps": variant.num_inference_steps}
        if variant.artifact is not None:
            pipe = self._twin(variant.name, variant.artifact)
        keys = batch.keys
        return sample_pipeline(
            pipe, call, batch.prompts, keys.indices, seed=keys.seeds[0], output_type=output_type
        )

    def _twin(self, name: str, artifact: RouterArtifact) -> Any:
        if name not in self._twins:
            twin = sharing_weights(self.pipe)
            apply(twin, artifact)
            self._twins[name] = twin
        return self._twins[name]

    def branch_names(self, artifact: RouterArtifact) -> tuple[str, ...]:
        return tuple(str(branch["name"]) for branch in artifact.model["branches"])

    def _golden(self, artifact: RouterArtifact) -> Tensor:
        twin = sharing_weights(self.pipe)
        apply(twin, artifact)
        drawn = sample_pipeline(twin, self.call, [self.prompts[0]], [0], seed=_GOLDEN_SEED)
        return drawn[0].cpu()

    def record_sample(self, artifact: RouterArtifact) -> RouterArtifact:
        drawn = self._golden(artifact)
        check_finite(drawn[None], "the router's sample is")
        return replace(artifact, sample_CHW=drawn)

    def check_sample(self, artifact: RouterArtifact) -> None:
        compare_samples(self._golden(artifact), artifact.sample_CHW)


def sharing_weights(pipe: Any) -> Any:
    """Return a pipeline whose transformers are other modules with the same tensors."""
    twin = copy.copy(pipe)
    for name, part in vars(pipe).items():
        if any(part is each for each in transformers_of(pipe)):
            tensors = chain(part.parameters(), part.buffers())
            setattr(twin, name, copy.deepcopy(part, {id(tensor): tensor for tensor in tensors}))
    return twin
