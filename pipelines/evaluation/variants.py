"""The ways to sample the same noise that an evaluation compares."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.evaluation.evaluation_report import CACHED, FEWER, FULL, family_variant
from harmonica.models.base import BranchedTransformer
from harmonica.samplers import SamplerConfig, make_sampler

from ..config.workflow import WorkflowConfig


@dataclass(frozen=True)
class Variant:
    """One way to sample the same noise."""

    name: str
    sampler: SamplerConfig
    plan: Plan | None = None
    reuse: Reuse = "hold"
    reference: str = FULL
    """Name of the variant whose images these are compared with."""
    artifact: RouterArtifact | None = None
    """The router whose plan it is, for a pipeline, whose transformer takes no plan alone."""

    @property
    def num_inference_steps(self) -> int:
        return self.sampler.num_inference_steps

    def sample(self, model: BranchedTransformer, batch: Batch) -> Tensor:
        sampler = make_sampler(model, self.sampler)
        return sample(
            sampler, batch.noise_NCHW, batch.condition_N, self.plan, reuse=self.reuse, keys=batch.keys
        )


def make_variants(config: WorkflowConfig, artifact: RouterArtifact, fewer_steps: int = 2) -> list[Variant]:
    """Return the variants full, cached and fewer steps, in this order."""
    cached = Variant(CACHED, config.sampler, artifact.plan, artifact.reuse, artifact=artifact)
    fewer = replace(config.sampler, num_inference_steps=fewer_steps)
    return [Variant(FULL, config.sampler), cached, Variant(FEWER, fewer)]


def make_family_variants(config: WorkflowConfig, family: Mapping[str, RouterArtifact]) -> list[Variant]:
    """Return one variant for each member, named by `family_variant`."""
    return [
        Variant(family_variant(name), config.sampler, one.plan, one.reuse, artifact=one)
        for name, one in family.items()
    ]


def transfer_samplers(config: WorkflowConfig) -> dict[str, SamplerConfig]:
    """Return by title each other sampler, guidance and step count of `evaluate`."""
    others: dict[str, SamplerConfig] = {}
    for name in config.evaluate.transfer:
        others[name] = replace(config.sampler, name=name, scheduler=None)
    for scale in config.evaluate.transfer_guidance:
        others[f"guidance {scale:g}"] = replace(config.sampler, guidance_scale=scale)
    for steps in config.evaluate.transfer_steps:
        others[f"{steps} steps"] = replace(config.sampler, num_inference_steps=steps)
    return others


def make_transfer_variants(config: WorkflowConfig, artifact: RouterArtifact) -> list[Variant]:
    """Return full and cached sampling under each of `transfer_samplers`.

    The plan was not made for them.
    """
    variants = []
    for title, other in transfer_samplers(config).items():
        plan = artifact.plan.at_steps(other.num_inference_steps)
        full = f"{title} {FULL}"
        variants.append(Variant(full, other, reference=full))
        variants.append(Variant(f"{title} {CACHED}", other, plan, artifact.reuse, reference=full))
    return variants
