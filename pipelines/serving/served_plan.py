"""A plan that images are generated under, with all that belongs to it."""

from dataclasses import dataclass, field

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.samplers import Sampler

UNCACHED = "uncached"
"""Version name of the plans that compute every branch, which `high` uses."""


@dataclass(frozen=True, eq=False, slots=True)
class ServedPlan:
    """A plan with the sampler it was made for, and the version of its router.

    It is compared by identity: a request is generated under the plan that it was checked against, even if
    another router becomes champion meanwhile.
    """

    sampler: Sampler
    plan: Plan
    reuse: Reuse
    version: str
    ideal_speedup: float = 1.0
    scores: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    """The router's scores, steps by branches, rounded, for display."""
