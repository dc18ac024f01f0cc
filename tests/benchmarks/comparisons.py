"""Run comparisons, print the table, write `bench.json` in the current folder.

    python -m tests.benchmarks                    # some minutes on two cores (make bench)
    python -m tests.benchmarks --whole            # every size: hours there
    python -m tests.benchmarks full_pass growth   # these alone
    python -m tests.benchmarks gpu --help         # levels of execution on a GPU (tests/benchmarks/gpu.py)

Exit code 0 whether or not the aims hold: a busy machine must not fail a build. With torch, timm and
safetensors alone, `--dit` runs what needs no more.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from harmonica.io.paths import local
from tests.benchmarks.hardware import Hardware
from tests.benchmarks.model import full_pass, growth, reused_branch
from tests.benchmarks.sampling import planned_dit, planned_pixart
from tests.benchmarks.serving import serving
from tests.benchmarks.several_models import several_models
from tests.benchmarks.system import data, scaling, start
from tests.benchmarks.timing import Row, describe_machine
from tests.benchmarks.training import lambda_refresh, sdt_update

PLACED: tuple[Callable[..., Iterator[Row]], ...] = (
    sdt_update,
    lambda_refresh,
    planned_dit,
    reused_branch,
    growth,
    planned_pixart,
    full_pass,
)
"""These run on whatever hardware there is; the others on the CPU."""
DIT = (*(each for each in PLACED if each not in (planned_pixart, full_pass)), scaling, start)
BENCHMARKS = (*PLACED, scaling, start, data, serving, several_models)


def line(row: Row) -> str:
    """A comparison in words."""
    arms = ", ".join(f"{name} {t.median_s:.4g} s (spread {t.spread_s:.2g})" for name, t in row.arms.items())
    said = f"{row.what}: {row.value:.3f} {row.unit}; aim {row.aim} {'holds' if row.holds else 'missed'}"
    return f"{said}\n    {arms}" if arms else said


def run(benchmark: Callable[..., Iterator[Row]], places: list[Hardware], *, whole: bool) -> Iterator[Row]:
    """A comparison, on all hardware that it is for."""
    if benchmark not in PLACED:
        yield from benchmark(whole=whole)
        return
    for hardware in places:
        for row in benchmark(whole=whole, hardware=hardware):
            yield dataclasses.replace(row, what=f"{row.what} [{hardware}]")


def main() -> None:
    """The comparisons asked for, in order, each said as it is done."""
    names = [benchmark.__name__ for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m tests.benchmarks",
    )
    parser.add_argument("only", nargs="*", metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--whole", action="store_true", help="every size")
    parser.add_argument("--dit", action="store_true", help="what torch, timm and safetensors are enough for")
    parser.add_argument("--dtypes", nargs="+", default=(), choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="on a GPU both unless one is asked for"
    )
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    arguments = parser.parse_args()
    output = local(arguments.output, "output")
    if unknown := set(arguments.only) - set(names):
        parser.error(f"NAME is {', '.join(unknown)}: give some of {', '.join(names)}")
    offered = DIT if arguments.dit else BENCHMARKS
    chosen = [each for each in offered if not arguments.only or each.__name__ in arguments.only]
    hardware = Hardware.here(arguments.dtypes, compiled=arguments.compile)
    rows: list[Row] = []
    print(", ".join(f"{name} {value}" for name, value in describe_machine().items()), flush=True)
    for benchmark in chosen:
        print(f"\n{benchmark.__name__}: {(benchmark.__doc__ or '').splitlines()[0]}", flush=True)
        for row in run(benchmark, hardware, whole=arguments.whole):
            rows.append(row)
            print(f"  {line(row)}", flush=True)
    output.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    print(f"\n{sum(row.holds for row in rows)} of {len(rows)} aims hold; {output} has all numbers")
