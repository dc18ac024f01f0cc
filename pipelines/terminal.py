"""The table a workflow ends with."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

_COLUMNS = (
    ("steps", "num_inference_steps", "{:d}"),
    ("s / image", "seconds_per_image", "{:.4f}"),
    ("speedup", "speedup", "{:.2f}x"),
    ("PSNR to full", "psnr_to_full", "{:.2f} dB"),
    ("Frechet to full", "frechet_to_full", "{:.4f}"),
    ("Frechet to test", "frechet_to_test", "{:.3f}"),
    ("label accuracy", "label_accuracy", "{:.1%}"),
    ("same label", "label_agreement", "{:.1%}"),
)


def results_table(report: Mapping[str, Any]) -> None:
    """Full, cached and fewer steps, side by side."""
    share = report["realised_share"]
    title = (
        f"CUR {report['cur']:.1%}   ideal speedup {report['ideal_speedup']:.2f}x   "
        f"measured {report['measured_speedup']:.2f}x"
        + (f"   realised share {share:.2f}" if share is not None else "")
        + f"   {report['samples']} images"
    )
    table = Table(title=title, title_style="bold", title_justify="left")
    arms = report["arms"]
    shown = [column for column in _COLUMNS if any(column[1] in arm for arm in arms.values())]
    table.add_column("arm")
    for heading, _, _ in shown:
        table.add_column(heading, justify="right")
    for name, arm in {**arms, **report.get("transfer", {})}.items():
        cells = [form.format(arm[key]) if key in arm else "" for _, key, form in shown]
        table.add_row(name.replace("_", " "), *cells)
    console = Console(highlight=False)
    # Where output goes to a file or a job's log, the table must not be folded to 80 columns.
    (console if console.is_terminal else Console(highlight=False, width=140)).print(table)
