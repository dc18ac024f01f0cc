"""Levels of execution beside diffusers' own module under torch.compile, on one GPU.

    python -m tests.benchmarks gpu                      # DiT-XL/2, at most five minutes of the device
    python -m tests.benchmarks gpu --device cpu --tiny  # the same script on something small

Random weights of the public shape, since speed does not depend on what was learnt. The important arms come
first, and every arm is written when it is done, so that a cut loses nothing. Needs torch (2.11 or later),
timm, safetensors and diffusers. No GPU has run this yet.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harmonica.core.cache import Reuse
from harmonica.core.plan import Plan
from harmonica.core.sampling import sample
from harmonica.models.base import Execution, freeze
from harmonica.models.dit.config import DiTConfig, dit_shape
from harmonica.models.dit.model import DiT
from harmonica.samplers import Sampler, State
from tests.benchmarks.arms import make_batch, make_sampler, random_plan
from tests.benchmarks.hardware import Hardware
from tests.benchmarks.model import as_diffusers
from tests.benchmarks.timing import describe_machine, seconds_of

TINY = DiTConfig(
    sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, num_attention_heads=2,
    attention_head_dim=8, num_embeds_ada_norm=10,
)  # fmt: skip
DIFFUSERS = "diffusers, torch.compile"
REFERENCE_MS: dict[tuple[str, int], float] = {
    (DIFFUSERS, 1): 59.5, (DIFFUSERS, 8): 184.7,
    ("eager float32 full", 1): 224, ("eager float32 full", 8): 328,
    ("eager float32 even hold", 1): 133, ("eager float32 even hold", 8): 194,
    ("eager float32 random 37.5% hold", 1): 184, ("eager float32 random 37.5% hold", 8): 226,
    ("compiled float32 full", 1): 285, ("compiled float32 full", 8): 332,
    ("compiled float32 even hold", 1): 155, ("compiled float32 even hold", 8): 193,
    ("compiled float32 random 37.5% hold", 1): 193, ("compiled float32 random 37.5% hold", 8): 226,
    ("graphed float32 full", 1): 52.4, ("graphed float32 full", 8): 184.5,
    ("graphed float32 even hold", 1): 24.0, ("graphed float32 even hold", 8): 102.2,
    ("graphed float32 random 37.5% hold", 1): 34.8, ("graphed float32 random 37.5% hold", 8): 122.0,
    ("graphed weights full", 1): 45.1, ("graphed weights full", 8): 178.8,
    ("graphed weights even hold", 1): 23.5, ("graphed weights even hold", 8): 94.0,
    ("graphed weights random 37.5% hold", 1): 30.0, ("graphed weights random 37.5% hold", 8): 115.4,
}  # fmt: skip
"""Milliseconds on one H100, torch 2.11, before the engine; `graphed` is what a prototype reached."""


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """One way to sample one batch."""

    name: str
    batch: int
    run: Callable[[], Tensor]
    full: str = ""
    """Name of the arm that computes everything in the same way."""
    ideal: float = 1.0
    """Multiply-accumulates of a full trajectory over those of this one."""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What an arm took."""

    name: str
    batch: int
    ms: float
    spread_ms: float
    first_s: float
    """The first run, which compiles."""
    second_s: float
    """The second, which records where steps are recorded."""
    ideal: float
    of_diffusers: float | None
    realised_share: float | None
    reference_ms: float | None


def make_model(shape: DiTConfig, device: str, dtype: torch.dtype) -> DiT:
    """A frozen random DiT, made where it runs."""
    with torch.device(device):
        model = DiT(shape)
    model.initialize(torch.Generator(device).manual_seed(0), zero=False)
    freeze(model)
    return Hardware(device, dtype).place(model)


def uncached(module: Callable[..., Tensor], sampler: Sampler, noise: Tensor, labels: Tensor) -> Tensor:
    """A whole guided trajectory of diffusers' module, with our sampler's arithmetic around it."""
    guided_labels = sampler.model.guided_condition(labels)
    state = State(torch.cat([noise, noise]), ())
    for i in reversed(range(sampler.num_steps)):
        timestep = torch.full_like(guided_labels, int(sampler.timesteps[i]))
        state = sampler.advance(i, state, sampler.guide(module(state.x_MCHW, timestep, guided_labels)))
    return sampler.finish(state)


def diffusers_arm(model: DiT, sampler: Sampler, size: int, hardware: Hardware) -> Arm:
    """diffusers' own module under one line of torch.compile."""
    module = as_diffusers(model, hardware, mode="reduce-overhead" if hardware.is_gpu else "default")
    batch = make_batch(model, size)

    def run() -> Tensor:
        with torch.inference_mode():
            return uncached(module, sampler, *batch)

    return Arm(DIFFUSERS, size, run)


def our_arms(model: DiT, sampler: Sampler, size: int, *, levels: tuple[Execution, ...]) -> Iterator[Arm]:
    """All levels, residual streams and plans; the most telling first."""
    steps, branches, batch = sampler.num_steps, len(model.branches), make_batch(model, size)
    even = Plan(tuple(((steps - 1 - i) % 2 == 0,) * branches for i in range(steps)))
    plans: list[tuple[str, Plan | None, tuple[Reuse, ...]]] = [
        ("full", None, ("hold",)),
        ("even", even, ("hold", "forecast")),
        ("random 37.5%", random_plan(steps, branches, 0.375), ("hold", "forecast")),
        ("random 50%", random_plan(steps, branches, 0.5), ("hold", "forecast")),
    ]
    for execution in levels:
        for residual in ("float32", "weights") if execution == "graphed" else ("float32",):
            way = f"{execution} {residual}"
            for title, plan, reuses in plans:
                for reuse in reuses:
                    name = f"{way} {title}" + (f" {reuse}" if plan else "")

                    def run(
                        plan: Plan | None = plan,
                        reuse: Reuse = reuse,
                        execution: Execution = execution,
                        residual: str = residual,
                    ) -> Tensor:
                        model.execution = execution
                        model.residual_dtype = model.dtype if residual == "weights" else None
                        return sample(sampler, *batch, plan, reuse=reuse)

                    yield Arm(
                        name, size, run, f"{way} full", plan.ideal_speedup(model.macs()) if plan else 1.0
                    )


def measure(arm: Arm, rounds: int, done: list[Result]) -> Result:
    """Time an arm, after one run that compiles and one that records."""
    started = time.perf_counter()
    output = arm.run()
    first_s = _until(output, started)
    started = time.perf_counter()
    second_s = _until(arm.run(), started)
    assert output.isfinite().all(), f"{arm.name} at batch {arm.batch} is not finite"
    times = [1000 * seconds_of(arm.run) for _ in range(rounds)]
    ms, found = statistics.median(times), {(each.name, each.batch): each.ms for each in done}
    theirs, full = found.get((DIFFUSERS, arm.batch)), found.get((arm.full, arm.batch))
    share = (1 - ms / full) / (1 - 1 / arm.ideal) if full and arm.ideal > 1 else None
    return Result(
        *(arm.name, arm.batch, ms, max(times) - min(times), first_s, second_s, arm.ideal),
        *(ms / theirs if theirs else None, share, REFERENCE_MS.get((arm.name, arm.batch))),
    )


def _until(output: Tensor, started: float) -> float:
    if output.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def line(result: Result, *, with_reference: bool) -> str:
    """A row of the table."""

    def shown(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else format(value, form)

    reference = shown(result.reference_ms, ".1f") if with_reference else ""
    return (
        f"| {result.name} | {result.batch} | {result.ms:.1f} | {reference} | {shown(result.of_diffusers)} | "
        f"{result.ideal:.2f} | {shown(result.realised_share)} | {result.first_s:.1f} | "
        f"{result.second_s:.1f} |"
    )


def main(arguments: list[str]) -> None:
    """Measure arm by arm until there is no time left, and write all results after each."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m tests.benchmarks gpu",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two blocks, four steps, batches 1 and 2")
    parser.add_argument("--batches", type=int, nargs="+", help="1 8 32 where nothing else is asked for")
    parser.add_argument("--levels", nargs="+", choices=("eager", "compiled", "graphed"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=290.0, help="no arm begins after them")
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"))
    asked = parser.parse_args(arguments)
    dtype = torch.bfloat16 if asked.device == "cuda" else torch.float32
    model = make_model(TINY if asked.tiny else dit_shape("DiT-XL/2"), asked.device, dtype)
    sampler = make_sampler(model, 4 if asked.tiny else 20)
    levels = tuple(asked.levels or ("graphed", "eager", "compiled"))
    hardware = Hardware(asked.device, dtype, compiled=True)
    machine, begun, done = describe_machine(), time.perf_counter(), list[Result]()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    print("| arm | batch | ms | gpu.md | of diffusers | ideal | realised | 1st s | 2nd s |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    model.graph_bytes = 32 * 2**30
    for size in asked.batches or ((1, 2) if asked.tiny else (1, 8, 32)):
        model.graphs = None  # recordings of the last batch size
        arms = [diffusers_arm(model, sampler, size, hardware)]
        for arm in [*arms, *our_arms(model, sampler, size, levels=levels)]:
            if time.perf_counter() - begun > asked.seconds:
                print(f"no time left for {arm.name} at batch {arm.batch}", file=sys.stderr, flush=True)
                continue
            done.append(measure(arm, asked.rounds, done))
            print(line(done[-1], with_reference=not asked.tiny), flush=True)
            found: dict[str, Any] = {"machine": machine, "arms": [dataclasses.asdict(each) for each in done]}
            asked.output.write_text(json.dumps(found, indent=1) + "\n")
