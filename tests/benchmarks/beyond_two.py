"""Quality beyond twice the speed: refined steps and fitted forecasts, beside published forecasts.

    python -m tests.benchmarks.beyond_two [--steps 50] [--speedups 3 4 5] [--images 48] [--seed 0]
        [--calibrated] [--no-ours]

Ours is the training of the `fashion` preset without what SDT and IEPO learn: rounds of refinement from even
steps, then the fit. Published forecasts have the even steps of the same speed, TaylorSeer also the intervals
of its authors, and with `--calibrated` come those methods that see 32 other images first. Each is judged by
the PSNR of its images to the full ones, of the same noise, which no training saw.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.models.loading import load_model
from harmonica.samplers import Sampler, make_sampler
from harmonica.training.plans.builders import even_plan
from harmonica.training.presets import fashion
from harmonica.training.trainer import RouterTrainer
from pipelines.compare.baselines.schedules import interval_plan
from pipelines.compare.baselines.taylorseer import taylorseer
from pipelines.compare.published import CALIBRATED, FORECASTS, interval_name, own_intervals
from tests.benchmarks.ideas import on_one_worker, rows

FIRST_JUDGED, BATCH = 100_000, 8


def images_of(sampler: Sampler, count: int, plan: Plan | None = None, reuse: Reuse = "forecast") -> Tensor:
    """Those that are judged (N, CHW)."""
    found = []
    for first in range(FIRST_JUDGED, FIRST_JUDGED + count, BATCH):
        batch = rows(sampler, 0, first, min(BATCH, FIRST_JUDGED + count - first))
        found.append(sample(sampler, batch.noise_NCHW, batch.condition_N, plan, reuse=reuse, keys=batch.keys))
    return torch.cat(found).flatten(1)


def ours(sampler: Sampler, speedup: float, seed: int, rounds: int) -> Iterator[tuple[str, Plan]]:
    """The refined steps, and those with their fitted forecasts."""
    recipe = fashion().train
    config = replace(
        recipe.for_target(target_speedup=speedup),
        initial="even",
        start_trajectories=0,
        refine_rounds=rounds,
        trajectories=1,  # which the choice takes back
        choice_trajectories=1,
    )
    run = RouterTrainer(sampler, config, seed=seed)
    while run.trajectory < config.all_trajectories:
        batch = rows(sampler, seed, run.trajectory * config.batch_size, config.batch_size)
        run.train_one(batch, on_one_worker)
    plan = run.artifact().plan
    yield "refined steps, linear forecast", Plan(plan.compute)
    yield "refined steps, fitted forecast", plan


def published(
    sampler: Sampler, speedup: float, seed: int, calibrated: bool
) -> Iterator[tuple[str, Plan, Reuse]]:
    """Those of `pipelines.compare`; each plan is made when it is asked for."""
    num_steps, macs = sampler.num_steps, sampler.model.macs()
    even = even_plan(num_steps, macs, speedup)
    yield "even steps, linear forecast (TaylorSeer)", even, "forecast"
    yield "even steps, held (FORA)", even, "hold"
    for name, forecast in FORECASTS.items():
        yield name, forecast(even), "forecast"
    for interval, order in own_intervals(num_steps, macs, [speedup]):
        plan = interval_plan(num_steps, len(macs.branches), interval)
        yield interval_name(interval, order), taylorseer(plan, order), "forecast"
    batches = [rows(sampler, seed, first, BATCH) for first in range(0, 4 * BATCH, BATCH)]
    for name, (make, reuse) in CALIBRATED.items() if calibrated else ():
        yield name, make(sampler, batches, speedup), reuse


Measured = tuple[float, float, float]
"""The ideal speed, PSNR in dB, and the mean PSNR of the worst tenth of the images."""


def measure(num_steps: int, speedup: float, chosen: argparse.Namespace) -> Iterator[tuple[str, Measured]]:
    """Each arm, as it is done."""
    recipe, fewer, count = fashion(), round(num_steps / speedup), chosen.images
    model = load_model(recipe.model).model
    settings = replace(recipe.sampler, num_inference_steps=num_steps)
    sampler, macs = make_sampler(model, settings), model.macs()
    full_NX = images_of(sampler, count)

    def judged(images_NX: Tensor, speed: float) -> Measured:
        psnr_N = 10 * (4 / (images_NX - full_NX).double().square().mean(1)).log10()
        worst = psnr_N.sort().values[: max(1, count // 10)]
        return speed, float(psnr_N.mean()), float(worst.mean())

    if chosen.ours:
        for name, plan in ours(sampler, speedup, chosen.seed, chosen.rounds):
            yield name, judged(images_of(sampler, count, plan), plan.ideal_speedup(macs))
    other = make_sampler(model, replace(settings, num_inference_steps=fewer))
    yield f"{fewer} steps", judged(images_of(other, count), num_steps / fewer)
    for name, plan, reuse in published(sampler, speedup, chosen.seed, chosen.calibrated):
        yield name, judged(images_of(sampler, count, plan, reuse), plan.ideal_speedup(macs))


def main() -> None:
    """The table of each speed, as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--speedups", type=float, nargs="+", default=[3.0, 4.0, 5.0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2, help="of refinement")
    parser.add_argument("--calibrated", action="store_true", help="also methods that see images first")
    parser.add_argument("--no-ours", dest="ours", action="store_false", help="published methods alone")
    arguments = parser.parse_args()
    for speedup in arguments.speedups:
        table = Table(f"T = {arguments.steps}, {speedup:g}x", "ideal speed", "PSNR, dB", "worst tenth")
        for name, (speed, mean, worst) in measure(arguments.steps, speedup, arguments):
            table.add_row(name, f"{speed:.2f}", f"{mean:.1f}", f"{worst:.1f}")
            Console().print(f"{name}: {speed:.2f}x {mean:.1f} dB, worst {worst:.1f}", highlight=False)
        Console().print(table)


if __name__ == "__main__":
    main()
