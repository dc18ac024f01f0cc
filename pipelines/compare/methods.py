"""Define the methods compared at each speed.

They are our routers, other learned plans and untrained plans.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmonica.core.artifact import RouterArtifact
from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_plan, threshold_for, with_fixed_correction
from harmonica.evaluation.evaluation_report import FULL
from harmonica.models.base import Macs
from harmonica.samplers import SamplerConfig
from harmonica.training.forecast_config import ForecastConfig

from ..config.workflow import TrainConfig
from ..evaluation.variants import Variant
from .names import FEWER_STEPS, OURS, PAPER, RELEASED

_RANDOM, _RANDOM_SEED = "random plan", 7
_CORRECTED = "fixed intervals + linear forecast + fixed correction (EvenSteps)"
_EVEN: dict[str, Reuse] = {
    "fixed intervals (FORA)": "hold",
    "fixed intervals + linear forecast (TaylorSeer)": "forecast",
    _CORRECTED: "forecast",
}
"""What baselines of even steps make of the values they kept."""


@dataclass(frozen=True)
class Entry:
    """A method that is compared at one target speed, with one seed."""

    method: str
    target: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the name of the variant and of its folder, which has no spaces."""
        name = self.method.replace(" ", "-").replace("+", "and").replace("(", "").replace(")", "")
        return f"{name}_{self.target:g}x_seed{self.seed}"


def learned_methods(train: TrainConfig, target: float, *, with_baselines: bool) -> dict[str, TrainConfig]:
    """Return the training settings of each learned method.

    All use the same number of trajectories.
    """
    # All by the same numbers and MACs, which would be measured for each by itself.
    ours = dataclasses.replace(train, budget=0.0, speed="macs").for_target(target_speedup=target)
    if not with_baselines:
        return {OURS: ours}
    paper = dataclasses.replace(
        ours,
        trajectories=ours.all_trajectories,
        start_trajectories=0,
        choice_trajectories=0,
        forecast=ForecastConfig(),
        initial="constant",
        initial_logit=2.0,
        iepo="leave_one_out",
        sdt=dataclasses.replace(
            train.sdt, reuse="hold", student="soft", penalty="count", learning_rate=0.15, threshold=0.1
        ),
    )
    pairwise = dataclasses.replace(paper.sdt, objective="pairwise")
    return {
        OURS: ours,
        PAPER: paper,
        RELEASED: dataclasses.replace(paper, iepo="cumulative"),
        "SDT without IEPO": dataclasses.replace(paper, iepo="none"),
        "Learning-to-Cache": dataclasses.replace(paper, iepo="none", sdt=pairwise),
    }


def learned_variant(entry: Entry, artifact: RouterArtifact) -> Variant:
    """Return the variant that samples by a trained router."""
    return Variant(entry.name, artifact.sampler, artifact.plan, artifact.reuse)


def untrained_entries(target: float, seeds: int) -> list[Entry]:
    """Return the entries of the baselines that need no training, at a speed.

    They are fewer steps of the same sampler, whole steps reused at even intervals (held, forecast, or also
    corrected), and random plans, one for each seed.
    """
    random = [Entry(_RANDOM, target, seed) for seed in range(seeds)]
    return [Entry(FEWER_STEPS, target), *(Entry(name, target) for name in _EVEN), *random]


def untrained_variant(sampler: SamplerConfig, macs: Macs, entry: Entry) -> Variant:
    """Return the variant of one of `untrained_entries`."""
    count, target = sampler.num_inference_steps, entry.target
    if entry.method == FEWER_STEPS:
        steps = max(1, round(count / target))
        return Variant(entry.name, dataclasses.replace(sampler, num_inference_steps=steps))
    if entry.method == _RANDOM:
        scores_TB = _random_scores(count, len(macs.branches), entry.seed)
        random = Plan.from_scores(scores_TB, threshold_for(scores_TB, macs, target))
        return Variant(entry.name, sampler, random, "hold")
    even = even_plan(count, macs, target)
    plan = with_fixed_correction(even) if entry.method == _CORRECTED else even
    return Variant(entry.name, sampler, plan, _EVEN[entry.method])


def _random_scores(num_steps: int, num_branches: int, seed: int) -> Tensor:
    generator = np.random.default_rng((_RANDOM_SEED, seed))
    return torch.from_numpy(generator.uniform(0.01, 0.99, (num_steps, num_branches)))


def full_variant(sampler: SamplerConfig) -> Variant:
    """Return the variant that computes everything."""
    return Variant(FULL, sampler)
