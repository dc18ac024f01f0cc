"""Quality over steps, speeds and training seeds: learned steps and forecasts, beside published methods.

    python -m tests.benchmarks.grid [--preset fashion] [--steps 10 20] [--speedups 1.2 1.4 1.6 2]
        [--seeds 0 1 2] [--images 64] [--results FILE] [--segments] [--published] [--calibrated]
    python -m tests.benchmarks.grid --table
    python -m tests.benchmarks.grid --write

Ours is the training of the preset without what SDT and IEPO learn: the measured start, the choice, then the
fit. Even steps of the same speed, after the same fit on the same images, stand beside it, so that the
difference is what the steps are worth; where they are what was learned, the two are one. Even steps with
linear forecasts and the fixed correction of `harmonica.EvenSteps` are ours without training. With
`--published` come published forecasts over the even steps and TaylorSeer at the intervals of its authors,
with `--calibrated` those methods that see 32 other images first. Each is judged by its images' distance to
the full ones of the same noise, which no training saw, nor the captions: PSNR and structural similarity,
`features` (LPIPS's distance on the convolutions of the shipped classifier) and the Frechet distance of its
pooled features; `worst` is the mean PSNR of the worst tenth. What no seed changes is measured once.

An arm is written to the results file as it is done, one JSON object a line; those that are there are left out
when the command is given again. By default the file is the one of this folder that `--table` reads.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from harmonica.models.loading import load_model
from harmonica.training.presets import RECIPES
from pipelines.evaluation.metric_networks import classifier_folder
from tests.benchmarks.grid.judging import Judge
from tests.benchmarks.grid.points import Series, first_judged, rows_of
from tests.benchmarks.grid.table import LOG, PRESETS, RESULTS, Line, read_lines, tables, with_tables


def measure(series: Series, speedup: float, judge: Judge, results: Path, **kinds: bool) -> list[Line]:
    """Add the arms of a point that the results lack, each as it is done, and return them.

    An arm that was fitted in another way is lacking; its line is left, and the new one counts.

    Raises:
        ValueError: the results are of another number of images.
    """
    lines = read_lines(results)
    if others := {line["images"] for line in lines} - {judge.count}:
        raise ValueError(f"{results} has {others} judged images and --images is {judge.count}: give its own")
    place = {"steps": series.sampler.num_steps, "speedup": speedup}
    done = {
        (line["method"], line["seed"], line.get("fit")) for line in lines if line.items() >= place.items()
    }
    added = []
    for arm in series.arms(speedup, **kinds):
        seed = series.seed if arm.depends_on_seed else None
        if (arm.name, seed, arm.fit) in done:
            continue
        started = time.process_time()
        found = judge.line(series.sampler, arm.make())
        spent = {"images": judge.count, "cpu_s": round(time.process_time() - started)}
        fit = {"fit": arm.fit} if arm.fit else {}
        line = place | {"seed": seed, "method": arm.name} | fit | found | spent
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        added.append(line)
    return added


def main(arguments: Sequence[str] | None = None) -> None:
    """Each arm of each point, as it is done; or the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default=PRESETS[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.2, 1.4, 1.6, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--results", type=Path, help="by default the preset's in this folder")
    parser.add_argument(
        "--segments", action="store_true", help="with train.forecast.segments, in own --results"
    )
    parser.add_argument("--published", action="store_true", help="also published forecasts")
    parser.add_argument("--calibrated", action="store_true", help="also methods that see images first")
    parser.add_argument("--table", action="store_true", help="print the tables of the results, in Markdown")
    parser.add_argument("--write", action="store_true", help="write them into RESULTS.md")
    chosen, console = parser.parse_args(arguments), Console()
    if chosen.table:
        print("\n\n".join(tables().values()))
        return
    if chosen.write:
        LOG.write_text(with_tables(LOG.read_text()))
        return
    recipe = RECIPES[chosen.preset]()
    if chosen.segments:
        forecast = replace(recipe.train.forecast, segments=True)
        recipe = replace(recipe, train=replace(recipe.train, forecast=forecast))
    loaded = load_model(recipe.model)
    rows = rows_of(recipe, loaded)
    judge = Judge(rows, chosen.images, classifier_folder(recipe.model), first_judged(recipe))
    results = chosen.results or RESULTS / f"{chosen.preset}.jsonl"
    for seed in chosen.seeds:
        for num_steps in chosen.steps:
            series = Series(recipe, loaded.model, rows, num_steps, seed)
            for speedup in chosen.speedups:
                added = measure(
                    series,
                    speedup,
                    judge,
                    results,
                    has_published=chosen.published,
                    has_calibrated=chosen.calibrated,
                )
                for line in added:
                    console.print(line, highlight=False)


if __name__ == "__main__":
    main()
