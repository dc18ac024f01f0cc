"""Print tables on the terminal at the end of a workflow."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from harmonica.evaluation.evaluation_report import Estimate, EvaluationReport, estimates_from_json
from harmonica.evaluation.metric_table import (
    CLIP_SCORE,
    CUR,
    FRECHET_TO_FULL,
    FRECHET_TO_REFERENCE,
    FRECHET_TO_TEST,
    IDEAL_SPEEDUP,
    LABEL_ACCURACY,
    LABEL_AGREEMENT,
    METRICS,
    NUM_INFERENCE_STEPS,
    PSNR_TO_FULL,
    SECONDS_PER_IMAGE,
    SPATIAL_FRECHET_TO_REFERENCE,
    SPEEDUP,
)

from ..compare.names import shown_name
from ..compare.ranking import summary_of

_COLUMNS = (
    NUM_INFERENCE_STEPS,
    SECONDS_PER_IMAGE,
    SPEEDUP,
    PSNR_TO_FULL,
    FRECHET_TO_FULL,
    FRECHET_TO_TEST,
    FRECHET_TO_REFERENCE,
    SPATIAL_FRECHET_TO_REFERENCE,
    CLIP_SCORE,
    LABEL_ACCURACY,
    LABEL_AGREEMENT,
)
_COMPARED = {
    CUR: METRICS[CUR].heading,
    IDEAL_SPEEDUP: "ideal",
    SPEEDUP: "measured",
    PSNR_TO_FULL: METRICS[PSNR_TO_FULL].heading,
    FRECHET_TO_FULL: METRICS[FRECHET_TO_FULL].heading,
}
"""The metrics of a comparison's table, and their headings."""


def _cell(key: str, of: Mapping[str, Estimate]) -> str:
    """Return a number, with half the width of its 95% interval if it has one."""
    if key not in of:
        return ""
    form, ends = METRICS[key].column_form, of[key].interval
    spread = f" \u00b1{form.format((ends[1] - ends[0]) / 2)}" if ends and "%" not in form else ""
    return form.format(of[key].value) + spread


def results_table(report: EvaluationReport) -> None:
    """Print the results of all variants, and below them the distances' noise floor."""
    speeds, share = report.speeds, report.speeds.realised_share
    title = (
        (f"cached by {speeds.method}\n" if speeds.method else "")
        + f"CUR {speeds.cur:.1%}   ideal speedup {speeds.ideal_speedup:.2f}x   "
        f"measured {speeds.measured_speedup:.2f}x"
        + (f"   realised share {share:.2f}" if share is not None else "")
        + f"   {report.samples} images"
    )
    table = Table(title=title, title_style="bold", title_justify="left")
    measured = [variant.numbers for variant in report.variants.values()]
    shown = [key for key in _COLUMNS if any(key in numbers for numbers in measured)]
    table.add_column("variant")
    for key in shown:
        table.add_column(METRICS[key].heading, justify="right")
    for name, variant in {**report.variants, **report.transfer}.items():
        numbers = variant.numbers
        table.add_row(name.replace("_", " "), *(_cell(key, numbers) for key in shown))
    if report.noise_floor is not None:
        numbers = report.noise_floor.numbers
        table.add_section()
        table.add_row("full, other noise", *(_cell(key, numbers) for key in shown))
    _console().print(table)


def comparison_table(comparison: Mapping[str, Any]) -> None:
    """Print all points of a comparison by target speed.

    Libraries, which have no target, come last. A list below the table says what was not measured, and why.
    """
    title = f"{comparison['sampler']}, {comparison['num_inference_steps']} steps"
    table = Table(title=title, title_style="bold", title_justify="left")
    for heading in ("target", "method", "seed", *_COMPARED.values()):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    points = sorted(comparison["points"], key=lambda p: (p.get("target_speedup", 99), -p[PSNR_TO_FULL]))
    before = points[0].get("target_speedup") if points else None
    for point in points:
        if (target := point.get("target_speedup")) != before:
            table.add_section()
        before = target
        numbers = estimates_from_json(point)
        made_for = f"{target:.1f}x" if target is not None else ""
        seed = str(point.get("seed", ""))
        table.add_row(made_for, shown_name(point), seed, *(_cell(key, numbers) for key in _COMPARED))
    console = _console()
    console.print(table)
    if missing := comparison.get("not_measured"):
        console.print(summary_of(missing), markup=False)


def _console() -> Console:
    """Return a console that does not fold tables to 80 columns in files and logs."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)
