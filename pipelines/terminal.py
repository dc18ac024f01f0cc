"""What a person at the terminal sees: parsed settings, one line an error, the results table."""

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from pipelines.config import WorkflowConfig

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


def parse(arguments: list[str], presets: Mapping[str, Callable[[], WorkflowConfig]]) -> WorkflowConfig:
    """A preset (the first one where none is named) with its overrides.

    Raises:
        ValueError: unknown preset, or a value its field refuses. An unknown or malformed option ends
            the program with tyro's message and exit code 2.
    """
    default = next(iter(presets))
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    elif arguments and arguments[0] in ("-h", "--help"):
        say(f"presets: {', '.join(presets)} (default {default}); settings of {default}:")
        name, rest = default, arguments
    else:
        name, rest = default, arguments
    if name not in presets:
        raise ValueError(f"preset is {name!r}: give one of {', '.join(presets)}")
    return _parse_quietly(WorkflowConfig, presets[name](), rest, f"workflow.py {name}")


def _parse_quietly(
    kind: type[WorkflowConfig], default: WorkflowConfig, rest: list[str], prog: str
) -> WorkflowConfig:
    """tyro's parser, but a value that a field's own check refuses comes out as that check's error.

    tyro prints such an error in a box, folded to the terminal's width, and exits; its own messages
    (unknown option, not a number) stay as they are.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, default=default, args=rest, prog=prog)
    except SystemExit as exit_:
        refused = exit_.__context__
        while refused is not None:
            frames = traceback.extract_tb(refused.__traceback__)
            if isinstance(refused, ValueError) and any(f.name == "__post_init__" for f in frames):
                raise refused from None
            refused = refused.__context__
        sys.stderr.write(said.getvalue())
        raise


def say(text: str) -> None:
    """A line of progress."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def fail(error: BaseException | str, *, code: int) -> int:
    """One line for the user on standard error; a stage's own fault comes with its traceback above."""
    if isinstance(error, BaseException) and code == 1:
        traceback.print_exception(error)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"error: {error}", markup=False)
    sys.stderr.flush()
    return code


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
    for name, arm in arms.items():
        cells = [form.format(arm[key]) if key in arm else "" for _, key, form in shown]
        table.add_row(name.replace("_", " "), *cells)
    console = Console(highlight=False)
    # Where output goes to a file or a job's log, the table must not be folded to 80 columns.
    (console if console.is_terminal else Console(highlight=False, width=140)).print(table)
