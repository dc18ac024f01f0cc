"""Levels of execution beside diffusers' own module under torch.compile, on one GPU.

    python -m tests.benchmarks gpu                      # at most five minutes of the device
    python -m tests.benchmarks gpu --sections sdt dit-512
    python -m tests.benchmarks gpu --device cpu --tiny  # the same script on something small

The important arms come first (`tests/benchmarks/gpu_arms.py`), and every arm is written when it is done, so
that a cut loses nothing. Needs torch (2.13 or later), timm, safetensors and diffusers; cache-dit where it is
installed. No GPU has run this yet.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.gpu_arms import DIFFUSERS, SECTIONS, Arm, Setting
from tests.benchmarks.timing import describe_machine, seconds_of

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
class Result:
    """What an arm took."""

    section: str
    name: str
    batch: int
    ms: float
    spread_ms: float
    first_s: float
    """The first run, which compiles."""
    second_s: float
    """The second, which records where steps are recorded."""
    peak_gib: float | None
    """Most memory while it was timed, with the weights."""
    ideal: float
    full: str
    updates_per_s: float | None = None
    of_diffusers: float | None = None
    realised_share: float | None = None
    reference_ms: float | None = None

    def beside(self, done: "list[Result]") -> "Result":
        """Compare with diffusers' module and with the arm that computes everything, once they are done."""
        found = {(each.section, each.name, each.batch): each.ms for each in done}
        theirs = found.get((self.section, DIFFUSERS, self.batch))
        full = found.get((self.section, self.full, self.batch))
        share = (1 - self.ms / full) / (1 - 1 / self.ideal) if full and self.ideal > 1 else None
        ratio = self.ms / theirs if theirs else None
        return dataclasses.replace(self, of_diffusers=ratio, realised_share=share)


def measure(arm: Arm, rounds: int) -> Result:
    """Time an arm, after one run that compiles and one that records."""
    started = time.perf_counter()
    first_s = _until(arm.run(), started)
    started = time.perf_counter()
    output = arm.run()
    second_s = _until(output, started)
    assert arm.is_graphed() or not output.is_cuda, (
        f"{arm.name} at batch {arm.batch} runs without graphs: the log says why"
    )
    assert output.isfinite().all(), f"{arm.name} at batch {arm.batch} is not finite"
    if output.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [1000 * seconds_of(arm.run) for _ in range(rounds)]
    ms = statistics.median(times)
    return Result(
        *(arm.section, arm.name, arm.batch, ms, max(times) - min(times), first_s, second_s),
        torch.cuda.max_memory_allocated() / 2**30 if output.is_cuda else None,
        *(arm.ideal, arm.full),
        updates_per_s=1000 * arm.updates / ms if arm.updates else None,
        reference_ms=REFERENCE_MS.get((arm.name, arm.batch)) if arm.section == "dit-256" else None,
    )


def _until(output: Tensor, started: float) -> float:
    if output.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def process_seconds() -> float | None:
    """Seconds since this process began, its imports among them; None where Linux does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


HEAD = (
    "| section | arm | batch | ms | gpu.md | of diffusers | ideal | realised | 1st s | 2nd s | GiB | "
    "updates/s |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(result: Result, *, with_reference: bool) -> str:
    """A row of the table."""

    def shown(value: float | None, form: str = ".2f") -> str:
        return "" if value is None else format(value, form)

    reference = shown(result.reference_ms, ".1f") if with_reference else ""
    return (
        f"| {result.section} | {result.name} | {result.batch} | {result.ms:.1f} | {reference} | "
        f"{shown(result.of_diffusers)} | {result.ideal:.2f} | {shown(result.realised_share)} | "
        f"{result.first_s:.1f} | {result.second_s:.1f} | {shown(result.peak_gib, '.1f')} | "
        f"{shown(result.updates_per_s)} |"
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
    parser.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=tuple(SECTIONS))
    parser.add_argument("--batches", type=int, nargs="+", help="1 8 32 where nothing else is asked for")
    parser.add_argument("--levels", nargs="+", choices=("eager", "compiled", "graphed"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=4.75, help="no arm begins after them")
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"))
    asked = parser.parse_args(arguments)
    batches = tuple(asked.batches or ((1, 2) if asked.tiny else (1, 8, 32)))
    levels = tuple(asked.levels or ("graphed", "eager", "compiled"))
    setting = Setting(asked.device, asked.tiny, batches, levels)
    begun, done, first = time.perf_counter(), list[Result](), dict[str, float | None]()
    machine, begun_s = describe_machine(), process_seconds()
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    print(HEAD, flush=True)
    for section in (each for each in SECTIONS if each in asked.sections):
        if time.perf_counter() - begun > 60 * asked.minutes:
            print(f"no time left for {section}", file=sys.stderr, flush=True)
            continue
        for arm in SECTIONS[section](setting):
            if time.perf_counter() - begun > 60 * asked.minutes:
                print(f"no time left for {arm.name} at batch {arm.batch}", file=sys.stderr, flush=True)
                break
            model_s = time.perf_counter() - begun
            done.append(measure(arm, asked.rounds))
            if not first:
                first = _first_image(done[0], begun_s, model_s)
            done[:] = [each.beside(done) for each in done]
            print(line(done[-1], with_reference=not asked.tiny), flush=True)
            found: dict[str, Any] = {"machine": machine, "first_image": first}
            found["arms"] = [dataclasses.asdict(each) for each in done]
            asked.output.write_text(json.dumps(found, indent=1) + "\n")
    print("\nall, each beside its full and diffusers' own:\n" + HEAD)
    print("\n".join(line(each, with_reference=not asked.tiny) for each in done), flush=True)


def _first_image(result: Result, begun_s: float | None, model_s: float) -> dict[str, float | None]:
    """Itemise what the first image of a fresh process takes, and print it."""
    found = {
        "process_and_imports_s": begun_s,
        "model_s": model_s,
        "first_image_with_compiling_s": result.first_s,
        "second_image_with_capture_s": result.second_s,
        "third_image_s": result.ms / 1000,
    }
    said = ", ".join(f"{name} {value:.2f}" for name, value in found.items() if value is not None)
    print(f"first image, {result.name} at batch {result.batch}: {said}", file=sys.stderr, flush=True)
    return found
