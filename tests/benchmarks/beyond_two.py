"""Quality beyond twice the speed: learned steps and forecasts, beside published forecasts.

    python -m tests.benchmarks.beyond_two [--steps 50] [--speedups 3 4 5] [--images 48] [--seed 0]

Ours is the training of the `fashion` preset without what SDT and IEPO learn: the measured start, then the
fit. The others have the even steps of the same speed. Each is judged by the PSNR of its
images to the full ones, of the same noise, which no training saw.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.models.loading import load_model
from harmonica.samplers import Sampler, make_sampler
from harmonica.training.plans.builders import even_plan
from harmonica.training.presets import fashion
from harmonica.training.trainer import RouterTrainer
from pipelines.compare.published import forecast_methods
from tests.benchmarks.ideas import on_one_worker, rows

FIRST_JUDGED, BATCH = 100_000, 8


def images_of(sampler: Sampler, count: int, plan: Plan | None = None, reuse: str = "forecast") -> Tensor:
    """Those that are judged (N, CHW)."""
    found = []
    for first in range(FIRST_JUDGED, FIRST_JUDGED + count, BATCH):
        batch = rows(sampler, 0, first, min(BATCH, FIRST_JUDGED + count - first))
        found.append(sample(sampler, batch.noise_NCHW, batch.condition_N, plan, reuse=reuse, keys=batch.keys))
    return torch.cat(found).flatten(1)


def ours(sampler: Sampler, speedup: float, seed: int) -> Iterator[tuple[str, Plan]]:
    """The learned steps, and those with their fitted forecasts."""
    recipe = fashion().train
    config = replace(
        recipe.for_target(target_speedup=speedup),
        trajectories=1,  # one update moves no entry
    )
    run = RouterTrainer(sampler, config, seed=seed)
    while run.trajectory < config.all_trajectories:
        batch = rows(sampler, seed, run.trajectory * config.batch_size, config.batch_size)
        run.train_one(batch, on_one_worker)
    plan = run.artifact().plan
    yield "learned steps, linear forecast", Plan(plan.compute)
    yield "learned steps, fitted forecast", plan


def measure(num_steps: int, speedup: float, seed: int, count: int) -> dict[str, tuple[float, float]]:
    """PSNR in dB by arm: the mean, and the mean of the worst tenth."""
    recipe, fewer = fashion(), round(num_steps / speedup)
    model = load_model(recipe.model).model
    settings = replace(recipe.sampler, num_inference_steps=num_steps)
    sampler, macs = make_sampler(model, settings), model.macs()
    full_NX = images_of(sampler, count)
    even = even_plan(num_steps, macs, speedup)
    arms = dict(ours(sampler, speedup, seed)) | {"even steps, linear forecast (TaylorSeer)": even}
    arms |= {entry.method: variant.plan for entry, variant in forecast_methods(settings, macs, speedup)}
    made = {name: images_of(sampler, count, plan) for name, plan in arms.items()}
    made["even steps, held (FORA)"] = images_of(sampler, count, even, "hold")
    other = make_sampler(model, replace(settings, num_inference_steps=fewer))
    made[f"{fewer} steps"] = images_of(other, count)
    found = {}
    for name, images_NX in made.items():
        psnr_N = 10 * (4 / (images_NX - full_NX).double().square().mean(1)).log10()
        found[name] = float(psnr_N.mean()), float(psnr_N.sort().values[: max(1, count // 10)].mean())
    return found


def main() -> None:
    """The table of each speed, as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--speedups", type=float, nargs="+", default=[3.0, 4.0, 5.0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for speedup in arguments.speedups:
        table = Table(f"T = {arguments.steps}, {speedup:g}x", "PSNR, dB", "worst tenth")
        found = measure(arguments.steps, speedup, arguments.seed, arguments.images)
        for name, (mean, worst) in found.items():
            table.add_row(name, f"{mean:.1f}", f"{worst:.1f}")
        Console().print(table)


if __name__ == "__main__":
    main()
