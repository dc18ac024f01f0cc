"""What each idea for training the router is worth: one thing changed at a time, over several seeds.

    python -m tests.benchmarks.ideas [--steps 10] [--speedup 1.4] [--seeds 0 1 2] [--ideas ...]

Routers of the built-in model are trained for as many trajectories as its preset's and cut at the same speed,
from its measured start unless said otherwise. What is printed is the PSNR to the full sampler's images, in
dB, on rows that none was trained on, before any choice and any fit. Beside them the steps that training
starts from, and evenly spread ones.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.plan_builders import even_plan, logits_of
from harmonica.core.router import Router
from harmonica.data.batch import Batch
from harmonica.models.loading import load_model
from harmonica.samplers import Sampler, make_sampler
from harmonica.samplers.noise import SampleKeys, sample_label
from harmonica.training.config import TrainingConfig
from harmonica.training.iepo import IepoKind
from harmonica.training.loss_weights import StepWeights
from harmonica.training.plans.search import StepSearch
from harmonica.training.plans.selection import PlanSelector
from harmonica.training.plans.step_form import LINEAR
from harmonica.training.presets import fashion
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.training.sdt import SdtTrainer
from harmonica.training.sdt_config import Student
from harmonica.training.target import TargetController

JUDGED_ROWS, FIRST_JUDGED = 48, 10_000
PROBES = 4
SHARPEST = 4.0


class SharpeningRouter(Router):
    """Scores that go from soft to hard."""

    sharpness = 1.0

    def scores(self, i: int) -> Tensor:
        return (self.sharpness * self.rows[i]).sigmoid()


@dataclass(frozen=True, kw_only=True)
class Idea:
    """One departure from the preset."""

    iepo: IepoKind | Literal["none"] = "sensitivity"
    start: str = "measured"
    reuse: Reuse = "forecast"
    penalty: Literal["count", "macs"] = "macs"
    guidance_scale: float | None = None
    logit: float = 2.0
    student: Student = "soft"
    """In training."""
    measured: Student = "soft"
    """For lambda."""
    router: type[Router] = Router


IDEAS = {
    "sensitivity, soft scores": Idea(),
    "no lambda": Idea(iepo="none"),
    "lambda: leave one out (paper)": Idea(iepo="leave_one_out"),
    "lambda: cumulative (released)": Idea(iepo="cumulative"),
    "lambda on hard plans": Idea(measured="hard"),
    "student on hard plans": Idea(student="hard"),
    "both on hard plans": Idea(student="hard", measured="hard"),
    "scores annealed, soft to hard": Idea(router=SharpeningRouter),
    "trained without guidance": Idea(guidance_scale=1.0),
    "penalty counts entries": Idea(penalty="count"),
    "from even steps": Idea(start="even"),
    "from scores of 0.5": Idea(start="constant"),
    "held, not forecast": Idea(reuse="hold"),
    "logits of 1, not 2": Idea(logit=1.0),
    "logits of 1, no lambda": Idea(logit=1.0, iepo="none"),
    "logits of 1, student on hard plans": Idea(logit=1.0, student="hard"),
    "logits of 1, both on hard plans": Idea(logit=1.0, student="hard", measured="hard"),
}


def rows(sampler: Sampler, seed: int, first: int, count: int) -> Batch:
    """Some of a seed's samples."""
    keys = SampleKeys.of(seed, range(first, first + count))
    shape = (sampler.model.in_channels, sampler.model.sample_size, sampler.model.sample_size)
    labels = torch.tensor(
        [sample_label(seed, index, sampler.model.num_classes) for index in range(first, first + count)]
    )
    return Batch(torch.from_numpy(keys.start_noise(shape)), labels, keys)


def on_one_worker(tensor: Tensor) -> None:
    """The mean over all of them."""


def starts_of(sampler: Sampler, config: TrainingConfig, seed: int) -> dict[str, Plan]:
    """The steps that training may start from, without and with measuring."""
    search, macs = StepSearch(sampler.num_steps, 1, LINEAR), sampler.model.macs()
    for trajectory in range(config.start_trajectories):
        batch = rows(sampler, seed, trajectory * config.batch_size, config.batch_size)
        search.observe(SamplerBackend(sampler), batch.split(4), PROBES, on_one_worker)
    return {
        "even": even_plan(sampler.num_steps, macs, config.target_speedup),
        "measured": search.plans(macs, config.target_speedup)[0],
    }


def trained_plan(
    idea: Idea, sampler: Sampler, config: TrainingConfig, starts: dict[str, Plan], seed: int
) -> Plan:
    """The router's, at the wanted speed."""
    shape = (sampler.num_steps, len(sampler.model.branches))
    router = idea.router(*shape, initial_logit=0.0)
    if idea.start in starts:
        logits_TB = logits_of(starts[idea.start], idea.logit)
        router = idea.router.from_logits(logits_TB)
    trainer = SdtTrainer(sampler, router, replace(config.sdt, student=idea.student))
    measured = replace(config, sdt=replace(config.sdt, student=idea.measured))
    weights, target = StepWeights(sampler.num_steps, measured), TargetController(trainer, config)
    for trajectory in range(config.trajectories):
        if isinstance(router, SharpeningRouter):
            router.sharpness = SHARPEST ** (trajectory / max(1, config.trajectories - 1))
        first = (config.start_trajectories + trajectory) * config.batch_size
        batches = [rows(sampler, seed, first, config.batch_size)]
        if weights.is_due(trajectory):
            weights.refresh(SamplerBackend(sampler), router, batches, on_one_worker)
        trainer.train_trajectory(batches, weights.lambda_T, beta=target.beta, on_gradient=target.observe)
        target.update()
    return target.plan_of(router.logits())


def psnr_of(sampler: Sampler, plan: Plan, reuse: Reuse, seed: int) -> float:
    """To the full sampler's images, in dB, the mean over rows."""
    choice = PlanSelector({"": plan}, reuse)
    choice.observe(SamplerBackend(sampler), [rows(sampler, seed, FIRST_JUDGED, JUDGED_ROWS)], on_one_worker)
    return choice.psnr("")


def measure(
    steps: int, speedup: float, seed: int, names: Iterable[str], show: Callable[[str, float, Plan], None]
) -> None:
    """All ideas for one seed."""
    recipe = fashion()
    model = load_model(recipe.model).model
    settings = replace(recipe.sampler, num_inference_steps=steps)
    sampler = make_sampler(model, settings)
    config = replace(recipe.train, target_speedup=speedup)
    starts = starts_of(sampler, config, seed)
    for name, plan in starts.items():
        show(f"{name} steps, untrained", psnr_of(sampler, plan, "forecast", seed), plan)
    for name in names:
        idea = IDEAS[name]
        sdt = replace(config.sdt, reuse=idea.reuse, penalty=idea.penalty)
        changed = replace(config, sdt=sdt, iepo=idea.iepo, forecast=replace(config.forecast, trajectories=0))
        by = sampler
        if idea.guidance_scale is not None:
            by = make_sampler(model, replace(settings, guidance_scale=idea.guidance_scale))
        plan = trained_plan(idea, by, changed, starts, seed)
        show(name, psnr_of(sampler, plan, idea.reuse, seed), plan)


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--speedup", type=float, default=1.4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS))
    arguments = parser.parse_args()
    console, found = Console(), dict[str, list[float]]()
    for seed in arguments.seeds:

        def show(name: str, psnr: float, plan: Plan, seed: int = seed) -> None:
            found.setdefault(name, []).append(psnr)
            console.log(f"seed {seed}, {name}: {psnr:.2f} dB at CUR {plan.cur:.1%}")

        measure(arguments.steps, arguments.speedup, seed, arguments.ideas, show)
    table = Table(f"T = {arguments.steps}, {arguments.speedup}x", *map(str, arguments.seeds), "mean")
    for name, values in found.items():
        table.add_row(name, *(f"{value:.1f}" for value in values), f"{sum(values) / len(values):.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
