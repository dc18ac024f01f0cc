"""Tables printed to the terminal at the end of a workflow."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..compare.names import shown_name
from ..compare.ranking import summary_of

_COLUMNS = (
    ("steps", "num_inference_steps", "{:d}"),
    ("s / image", "seconds_per_image", "{:.4f}"),
    ("speedup", "speedup", "{:.2f}x"),
    ("PSNR to full, dB", "psnr_to_full", "{:.2f}"),
    ("Frechet to full", "frechet_to_full", "{:.4f}"),
    ("Frechet to test", "frechet_to_test", "{:.2f}"),
    ("FID", "frechet_to_reference", "{:.2f}"),
    ("sFID", "spatial_frechet_to_reference", "{:.2f}"),
    ("CLIP score", "clip_score", "{:.2f}"),
    ("label accuracy", "label_accuracy", "{:.1%}"),
    ("same label", "label_agreement", "{:.1%}"),
)

_COMPARED = (
    ("target", "target_speedup", "{:.1f}x"),
    ("method", "method", "{}"),
    ("seed", "seed", "{:d}"),
    ("CUR", "cur", "{:.1%}"),
    ("ideal", "ideal_speedup", "{:.2f}x"),
    ("measured", "speedup", "{:.2f}x"),
    ("PSNR to full, dB", "psnr_to_full", "{:.2f}"),
    ("Frechet to full", "frechet_to_full", "{:.4f}"),
)


def _cell(variant: Mapping[str, Any], key: str, form: str) -> str:
    """Return the number, with half the width of its 95% interval if it has one."""
    if key not in variant:
        return ""
    ends = variant.get(f"{key}_interval")
    spread = f" \u00b1{form.format((ends[1] - ends[0]) / 2)}" if ends and "%" not in form else ""
    return form.format(variant[key]) + spread


def results_table(report: Mapping[str, Any]) -> None:
    """Print the results of all variants, and below them the noise floor of the distances."""
    share = report["realised_share"]
    title = (
        (f"cached by {report['method']}\n" if "method" in report else "")
        + f"CUR {report['cur']:.1%}   ideal speedup {report['ideal_speedup']:.2f}x   "
        f"measured {report['measured_speedup']:.2f}x"
        + (f"   realised share {share:.2f}" if share is not None else "")
        + f"   {report['samples']} images"
    )
    table = Table(title=title, title_style="bold", title_justify="left")
    variants = report["arms"]
    shown = [column for column in _COLUMNS if any(column[1] in variant for variant in variants.values())]
    table.add_column("variant")
    for heading, _, _ in shown:
        table.add_column(heading, justify="right")
    for name, variant in {**variants, **report.get("transfer", {})}.items():
        cells = [_cell(variant, key, form) for _, key, form in shown]
        table.add_row(name.replace("_", " "), *cells)
    if noise_floor := report.get("noise_floor"):
        cells = [_cell(noise_floor, key, form) for _, key, form in shown]
        table.add_section()
        table.add_row("full, other noise", *cells)
    _console().print(table)


def comparison_table(comparison: Mapping[str, Any]) -> None:
    """Print all points of a comparison by target speed; libraries, which have none, come last.

    Under the table: what was not measured, and why.
    """
    title = f"{comparison['sampler']}, {comparison['num_inference_steps']} steps"
    table = Table(title=title, title_style="bold", title_justify="left")
    for heading, _, _ in _COMPARED:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    points = sorted(comparison["points"], key=lambda p: (p.get("target_speedup", 99), -p["psnr_to_full"]))
    before = points[0].get("target_speedup") if points else None
    for point in points:
        if (target := point.get("target_speedup")) != before:
            table.add_section()
        before = target
        shown = point | {"method": shown_name(point)}
        table.add_row(*(_cell(shown, key, form) for _, key, form in _COMPARED))
    console = _console()
    console.print(table)
    if missing := comparison.get("not_measured"):
        console.print(summary_of(missing), markup=False)


def _console() -> Console:
    """Return a console that does not fold tables to 80 columns in a file or a job's log."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)
