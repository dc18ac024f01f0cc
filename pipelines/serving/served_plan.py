"""Define the plan that images are generated under, and what belongs to it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.integrations.recorded.even_steps import EvenSteps
from harmonica.samplers import Sampler, SamplerConfig

UNCACHED = "uncached"
"""Version name of the plans that compute every branch, which `high` uses."""


def is_untrained(router: str) -> bool:
    """Return whether what is served needs no router, and so takes any steps."""
    return router == UNCACHED or EvenSteps.named(router) is not None


@dataclass(frozen=True, eq=False, slots=True)
class ServedPlan:
    """A served plan has the settings it was made for, and the version of its router.

    Served plans are compared by identity: a request is generated under the plan that it was checked against,
    even if another router becomes champion meanwhile.
    """

    config: SamplerConfig
    plan: Plan
    reuse: Reuse
    version: str
    ideal_speedup: float = 1.0
    scores: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """The router's scores, steps by branches, rounded, for display."""


@dataclass(frozen=True, eq=False, slots=True)
class SamplerPlan(ServedPlan):
    """A sampler's plan has the sampler itself."""

    sampler: Sampler = field(kw_only=True)

    def guided_sampler(self, scales: Sequence[float | None], *, has_fixed_shape: bool) -> Sampler:
        """Return the sampler, guided by the images' own scales if any has one.

        Args:
            scales: guidance scale of each image; None takes the sampler's.
            has_fixed_shape: guide either every batch under this plan or none, since guidance doubles the
                batch whichever of its images asks for it.
        """
        sampler = self.sampler
        may_guide = is_untrained(self.version) or sampler.is_guided
        if not may_guide if has_fixed_shape else all(scale is None for scale in scales):
            return sampler
        default = sampler.config.guidance_scale
        filled = [default if scale is None else scale for scale in scales]
        return sampler.with_guidance(filled, always=has_fixed_shape)


Served = TypeVar("Served", bound=ServedPlan)


@dataclass(frozen=True, slots=True)
class BatchKey(Generic[Served]):
    """The requests of a batch have the same key."""

    served: Served
    shared: Hashable = None
    """What the plan leaves open and the requests of a batch have in common."""
