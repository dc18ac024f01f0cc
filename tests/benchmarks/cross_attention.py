"""What it is worth to cache PixArt's cross-attention too, on the built-in text-to-image model.

    python -m tests.benchmarks.cross_attention [--trajectories 30]

Fixed plans first: every second step, each kind of branch alone and together. Then two routers with the same
budget, one that may reuse self-attention and MLP, one that may reuse all three, their scores cut where both
leave the same arithmetic. Distances are to the full sampler's images of the same captions and noise.
"""

import argparse
import dataclasses
import itertools

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harmonica.builtin import CAPTIONS
from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.data.batch import Batch
from harmonica.data.conditions import Conditions, make_conditions
from harmonica.evaluation.image_metrics import psnr
from harmonica.models.base import BranchedTransformer, Macs
from harmonica.models.loading import load_model
from harmonica.models.text_blocks import KINDS
from harmonica.models.text_condition import TextCondition
from harmonica.samplers import Sampler, make_sampler
from harmonica.samplers.noise import SampleKeys
from harmonica.training.presets import fashion_text
from harmonica.training.trainer import RouterTrainer

TRAINING_ROWS, JUDGED_ROWS = 4, 32
FIRST_JUDGED = 100_500
"""The first judged row: captions go round every 675 rows, and no training reaches the last 75 of a round."""
SPEEDUPS = (1.3, 1.45, 1.6, 1.75)
"""By MACs, at which the two routers are compared."""


def captions_of(first: int, count: int) -> list[str]:
    """The captions of some rows, by the rows' numbers."""
    captions = CAPTIONS.read_text().splitlines()
    return [captions[(7 * index) % len(captions)] for index in range(first, first + count)]


def rows(model: BranchedTransformer, conditions: Conditions, seed: int, first: int, count: int):
    """Noise, condition and keys of some rows."""
    keys, chosen = SampleKeys.of(seed, range(first, first + count)), captions_of(first, count)
    shape = (model.in_channels, model.sample_size, model.sample_size)
    condition = conditions.of(chosen, [""] * count)
    return torch.from_numpy(keys.start_noise(shape)), condition, keys


def every_second_step(sampler: Sampler, kinds: tuple[str, ...]) -> Plan:
    """Branches of these kinds are computed at every second step, the others always."""
    names = [branch.name.split()[0] for branch in sampler.model.branches]
    last = sampler.num_steps - 1
    return Plan(
        tuple(
            tuple((last - i) % 2 == 0 or name not in kinds for name in names)
            for i in range(sampler.num_steps)
        )
    )


def trained_scores(sampler: Sampler, conditions: Conditions, trajectories: int) -> tuple[Tensor, Reuse]:
    """By the preset, on one process."""
    config = dataclasses.replace(fashion_text().train, batch_size=TRAINING_ROWS, trajectories=trajectories)
    run = RouterTrainer(sampler, config, seed=0)
    for trajectory in range(config.start_trajectories + trajectories):
        batch = rows(sampler.model, conditions, 0, trajectory * TRAINING_ROWS, TRAINING_ROWS)
        run.train_one(Batch(*batch))
    return run.router.logits().sigmoid(), config.sdt.reuse


def cut(scores_TB: Tensor, macs: Macs, speedup: float) -> Plan:
    """The plan of these scores whose threshold brings it nearest to an ideal speedup."""
    plans = [Plan.from_scores(scores_TB, float(each)) for each in scores_TB[:-1].unique()]
    return min(plans, key=lambda plan: abs(plan.ideal_speedup(macs) - speedup))


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=fashion_text().train.trajectories)
    arguments = parser.parse_args()
    recipe, console = fashion_text(), Console()
    loaded = load_model(recipe.model)  # its preset may reuse all three
    sampler = make_sampler(loaded.model, recipe.sampler)
    conditions = make_conditions(loaded, "cpu", dtype="float32")
    noise, condition, keys = rows(loaded.model, conditions, 1, FIRST_JUDGED, JUDGED_ROWS)
    assert isinstance(condition, TextCondition)
    full = sample(sampler, noise, condition, keys=keys)

    def quality(by: Sampler, plan: Plan, reuse: Reuse) -> Tensor:
        return psnr(sample(by, noise, condition, plan, reuse=reuse, keys=keys), full)

    table = Table("every second step", "CUR", "ideal speedup", "PSNR, hold", "PSNR, forecast")
    for kinds in itertools.chain.from_iterable(itertools.combinations(KINDS, n) for n in (1, 2, 3)):
        plan = every_second_step(sampler, kinds)
        values = [f"{quality(sampler, plan, reuse).mean():.1f}" for reuse in ("hold", "forecast")]
        speedup = f"{plan.ideal_speedup(sampler.model.macs()):.2f}"
        table.add_row(" ".join(kinds), f"{plan.cur:.0%}", speedup, *values)
    console.print(table)

    table = Table("trained, cut at", *(f"{speedup:.2f}x" for speedup in SPEEDUPS))
    two = dataclasses.replace(recipe.model, cacheable=("attn", "mlp"))
    for by in (make_sampler(load_model(two).model, recipe.sampler), sampler):
        scores_TB, reuse = trained_scores(by, conditions, arguments.trajectories)
        cells = []
        for wanted in SPEEDUPS:
            plan = cut(scores_TB, by.model.macs(), wanted)
            ideal, distance = plan.ideal_speedup(by.model.macs()), quality(by, plan, reuse).mean()
            cells.append(f"{distance:.1f} dB (CUR {plan.cur:.1%}, {ideal:.2f}x)")
        table.add_row("attn mlp" if by is not sampler else "attn cross mlp", *cells)
    for steps in (10, 12, 14):
        fewer = make_sampler(loaded.model, dataclasses.replace(recipe.sampler, num_inference_steps=steps))
        distance = psnr(sample(fewer, noise, condition, keys=keys), full).mean()
        table.add_row(
            f"{steps} steps", f"{distance:.1f} dB ({recipe.sampler.num_inference_steps / steps:.2f}x)"
        )
    console.print(table)


if __name__ == "__main__":
    main()
