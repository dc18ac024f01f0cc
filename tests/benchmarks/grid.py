"""Quality over steps, speeds and training seeds: learned steps and forecasts, beside published methods.

    python -m tests.benchmarks.grid [--preset fashion] [--steps 10 20 50] [--speedups 1.2 1.4 1.6 2]
        [--seeds 0 1 2] [--images 96] [--results FILE] [--published] [--calibrated]

Ours is the training of the preset without what SDT and IEPO learn: the measured start, the choice, then the
fit. Its start is the even steps of the same speed, and the same fit of their forecasts stands beside it, so
that the difference is what the steps are worth. With `--published` come published forecasts over the even
steps and TaylorSeer at the intervals of its authors, with `--calibrated` those methods that see 32 other
images first. Each is judged by the PSNR and the structural similarity of its images to the full ones, of the
same noise, which no training saw; `worst` is the mean PSNR of the worst tenth. What no seed changes is
measured with the first one alone.

An arm is written to the results file as it is done, one JSON object a line; those that are there are left out
when the command is given again.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.data.conditions import make_conditions
from harmonica.evaluation.image_metrics import psnr, ssim
from harmonica.models.base import BranchedTransformer
from harmonica.models.loading import LoadedModel, load_model
from harmonica.samplers import Sampler, make_sampler
from harmonica.training.plans.builders import even_plan
from harmonica.training.plans.forecast_fit import ForecastFit
from harmonica.training.presets import RECIPES, Recipe
from harmonica.training.sampler_backend import SamplerBackend
from harmonica.training.trainer import RouterTrainer
from pipelines.compare.published import CALIBRATED, FORECASTS, interval_variant, own_intervals
from tests.benchmarks import cross_attention, ideas

FIRST_JUDGED, BATCH, CALIBRATION = 100_000, 8, 4
Rows = Callable[[Sampler, int, int, int], Batch]
"""Takes a sampler, a seed, the number of the first row and how many."""
Arm = Callable[[], tuple[Plan | None, Reuse, Sampler]]


def rows_of(recipe: Recipe, loaded: LoadedModel) -> Rows:
    """Labels of the class-conditional model, captions of the one that takes text."""
    if not recipe.model.text_tokens:
        return ideas.rows
    conditions = make_conditions(loaded, "cpu", dtype="float32")

    def captions(sampler: Sampler, seed: int, first: int, count: int) -> Batch:
        return Batch(*cross_attention.rows(sampler.model, conditions, seed, first, count))

    return captions


class Point:
    """One number of steps, speed and seed of a preset."""

    def __init__(
        self,
        recipe: Recipe,
        model: BranchedTransformer,
        rows: Rows,
        num_steps: int,
        speedup: float,
        seed: int,
    ) -> None:
        self.recipe, self.rows, self.speedup, self.seed = recipe, rows, speedup, seed
        settings = replace(recipe.sampler, num_inference_steps=num_steps)
        self.sampler = make_sampler(model, settings)
        self.fewer = make_sampler(model, replace(settings, num_inference_steps=round(num_steps / speedup)))
        self.even = even_plan(num_steps, model.macs(), speedup)

    def batch(self, trajectory: int) -> Batch:
        """Samples that are trained on."""
        size = self.recipe.train.batch_size
        return self.rows(self.sampler, self.seed, trajectory * size, size)

    def learned(self) -> tuple[Plan | None, Reuse, Sampler]:
        """Ours."""
        # One update moves no entry of the start.
        config = replace(self.recipe.train.for_target(target_speedup=self.speedup), trajectories=1)
        run = RouterTrainer(self.sampler, config, seed=self.seed)
        while run.trajectory < config.all_trajectories:
            run.train_one(self.batch(run.trajectory), ideas.on_one_worker)
        return run.artifact().plan, "forecast", self.sampler

    def even_fitted(self) -> tuple[Plan | None, Reuse, Sampler]:
        """Where ours starts from, after the same fit."""
        forecast, backend = self.recipe.train.forecast, SamplerBackend(self.sampler)
        fit, before = ForecastFit(self.even, forecast), self.recipe.train.start_trajectories
        for trajectory in range(forecast.trajectories):
            parts = self.batch(before + trajectory).split(forecast.rows_at_once)
            fit.observe(backend, parts, ideas.on_one_worker)
        return fit.planned(), "forecast", self.sampler

    def arms(self, *, is_first: bool, has_published: bool, has_calibrated: bool) -> Iterator[tuple[str, Arm]]:
        """What is compared, each made when it is asked for.

        Args:
            is_first: of the seeds, for which that is measured which no seed changes.
        """
        yield "learned steps, fitted forecast", self.learned
        yield "even steps, fitted forecast", self.even_fitted
        plans: dict[str, tuple[Plan | None, Reuse, Sampler]] = {
            "even steps, linear forecast": (self.even, "forecast", self.sampler),
            "even steps, held (FORA)": (self.even, "hold", self.sampler),
            "fewer steps": (None, "hold", self.fewer),
        }
        if has_published:
            num_steps, macs = self.sampler.num_steps, self.sampler.model.macs()
            plans |= {name: (of(self.even), "forecast", self.sampler) for name, of in FORECASTS.items()}
            for interval, order in own_intervals(num_steps, macs, [self.speedup]):
                variant = interval_variant(self.sampler.config, macs, interval, order)
                plans[variant.name] = variant.plan, "forecast", self.sampler
        if is_first:
            yield from ((name, partial(tuple, plan)) for name, plan in plans.items())
        for name in CALIBRATED if has_calibrated else ():
            yield name, partial(self._calibrated, name)

    def _calibrated(self, name: str) -> tuple[Plan | None, Reuse, Sampler]:
        make, reuse = CALIBRATED[name]
        batches = [self.rows(self.sampler, self.seed, k * BATCH, BATCH) for k in range(CALIBRATION)]
        return make(self.sampler, batches, self.speedup), reuse, self.sampler

    def images(self, sampler: Sampler, count: int, plan: Plan | None = None, reuse: Reuse = "hold") -> Tensor:
        """Those that are judged (N, C, H, W)."""
        found = []
        for first in range(FIRST_JUDGED, FIRST_JUDGED + count, BATCH):
            batch = self.rows(sampler, 0, first, min(BATCH, FIRST_JUDGED + count - first))
            inputs = (sampler, batch.noise_NCHW, batch.condition_N, plan)
            found.append(sample(*inputs, reuse=reuse, keys=batch.keys))
        return torch.cat(found)

    def speed(self, plan: Plan | None) -> float:
        """The ideal speed of a plan, or of fewer steps."""
        if plan is None:
            return self.sampler.num_steps / self.fewer.num_steps
        return plan.ideal_speedup(self.sampler.model.macs())


def main() -> None:
    """Each arm of each point, as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=("fashion", "fashion-text"), default="fashion")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.2, 1.4, 1.6, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--results", type=Path, default=Path("grid.jsonl"))
    parser.add_argument("--published", action="store_true", help="also published forecasts")
    parser.add_argument("--calibrated", action="store_true", help="also methods that see images first")
    chosen, console = parser.parse_args(), Console()
    lines = chosen.results.read_text().splitlines() if chosen.results.exists() else []
    done = {tuple(json.loads(line)["arm"]) for line in lines}
    recipe = RECIPES[chosen.preset]()
    loaded = load_model(recipe.model)
    rows = rows_of(recipe, loaded)
    points = [(t, s, seed) for seed in chosen.seeds for t in chosen.steps for s in chosen.speedups]
    for num_steps, speedup, seed in points:
        point = Point(recipe, loaded.model, rows, num_steps, speedup, seed)
        full_NCHW: Tensor | None = None
        for name, arm in point.arms(
            is_first=seed == chosen.seeds[0],
            has_published=chosen.published,
            has_calibrated=chosen.calibrated,
        ):
            key = (chosen.preset, num_steps, speedup, seed, name)
            if key in done:
                continue
            full_NCHW = point.images(point.sampler, chosen.images) if full_NCHW is None else full_NCHW
            plan, reuse, sampler = arm()
            images_NCHW = point.images(sampler, chosen.images, plan, reuse)
            psnr_N = psnr(images_NCHW, full_NCHW).double()
            worst = float(psnr_N.sort().values[: max(1, chosen.images // 10)].mean())
            found = {
                "arm": key,
                "speed": round(point.speed(plan), 3),
                "psnr": round(float(psnr_N.mean()), 2),
                "worst": round(worst, 2),
                "ssim": round(float(ssim(images_NCHW, full_NCHW).mean()), 4),
                "images": chosen.images,
            }
            with chosen.results.open("a") as file:
                file.write(json.dumps(found) + "\n")
            console.print(found, highlight=False)


if __name__ == "__main__":
    main()
