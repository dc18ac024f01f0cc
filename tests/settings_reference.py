"""Write down every command-line option: `assets/options.txt` freezes them, `SETTINGS.md` explains them.

    python -m tests.settings_reference

The test compares both files with the code. An option that is renamed or removed breaks the command lines of
users: keep the old one for a release with an error that names the new one, and say so in CHANGELOG.md.
"""

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from harmonica.cli.apply import ApplyCommand
from harmonica.cli.convert import ConvertCommand
from harmonica.cli.sample import SampleCommand
from harmonica.cli.train import TrainCommand
from harmonica.validation.setting_words import Wanted
from pipelines.capacity.command import CapacityCommand
from pipelines.config.workflow import WorkflowConfig
from pipelines.serve import ServeCommand
from pipelines.ui import UiCommand

ROOT = Path(__file__).parents[1]
OPTIONS = ROOT / "tests" / "assets" / "options.txt"
PAGE = ROOT / "pipelines" / "config" / "SETTINGS.md"
COMMANDS: dict[str, type] = {
    "workflow.py": WorkflowConfig,
    "harmonica.cli.train": TrainCommand,
    "harmonica.cli.sample": SampleCommand,
    "harmonica.cli.apply": ApplyCommand,
    "harmonica.cli.convert": ConvertCommand,
    "pipelines.serve": ServeCommand,
    "pipelines.ui": UiCommand,
    "pipelines.capacity": CapacityCommand,
}
WHEN = {
    "workflow.py": "Touch these to name a run, to place it, and to choose its stages.",
    "model": "Touch `path` for another model than the preset's, and `dtype` and `execution` on GPUs.",
    "model.shape": "Touch it for a bare checkpoint file of an unusual DiT only; folders bring their own.",
    "sampler": "Set it to what you will sample with: a router is refused under other settings.",
    "pipeline": "Touch it in the preset `pipeline`: the size and the guidance of the pipeline's calls.",
    "prompts": "Touch it for text-to-image models: `path` always, the rest for large sets.",
    "train": "Touch the target first, then the workers. The rest is the preset's recipe.",
    "train.sdt": "Research settings: the presets have what the paper or our measurements found.",
    "train.forecast": "Touch `trajectories` to fit forecasts or not; the rest is research.",
    "evaluate": "Touch `samples` for tighter numbers, and the paths for metrics that need files.",
    "sweep": "Touch it to search over targets, kinds of lambda and seeds with the stage `sweep`.",
    "promotion": "Touch it to say what a router must reach before it is served.",
    "serve": "Touch it for address, keys, load and latency of the endpoint.",
    "compare": "Touch it for the stage `compare`, which puts other methods beside this one.",
    "harmonica.cli.train": "Touch `output` to keep several trainings.",
    "harmonica.cli.sample": "Touch it on each call: what to sample, and with which router.",
    "harmonica.cli.apply": "Touch it on each call: which pipeline, plan and prompts.",
    "harmonica.cli.convert": "Touch it on each call: what to convert, and into which layout.",
    "pipelines.serve": "Touch it to serve another router than the registry's champion.",
    "pipelines.capacity": "Touch it before hardware is rented: model, GPU, rate and nodes.",
    "pipelines.ui": "Touch it if the runs are elsewhere or the port is taken.",
}
"""When a section of settings is worth touching."""
_HEAD = """# Settings

`python -m tests.settings_reference` writes this page from the code; do not edit it. The docstrings under the
fields are its text. Defaults are those of the classes: a preset sets some of them otherwise, as
`python workflow.py PRESET --help` shows. Every setting of the workflow is an option of `workflow.py`, spelled
with hyphens; the sections `model`, `sampler`, `train` and `serve` are shared with the other commands.
"""


class Option(NamedTuple):
    """One option of a command."""

    name: str
    takes: str
    default: str
    explanation: str
    home: type
    """The class of settings that declares it."""


def options(kind: type, prefix: str = "") -> Iterator[Option]:
    """The options of a class of settings, those of its sections after its own."""
    hints = typing.get_type_hints(kind, include_extras=True)
    sections = []
    for field in dataclasses.fields(kind):
        wanted = Wanted.of(hints[field.name])
        part = wanted.kind
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            sections.append((part, f"{prefix}{field.name}."))
        elif "Suppress" not in str(field.type) + str(hints[field.name]):
            name = f"--{prefix}{wanted.spelled or field.name}".replace("_", "-")
            words = wanted.words("", is_other_type=True)
            yield Option(name, words, _default(field), explanations(kind).get(field.name, ""), kind)
    for part, inner in sections:
        yield from options(part, inner)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory())
    return "required"


@cache
def explanations(kind: type) -> dict[str, str]:
    """The docstrings under a class's fields, and under those that it inherits, on one line each."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (node,) = (
            one
            for one in ast.parse(inspect.getsource(inspect.getmodule(base))).body  # type: ignore[arg-type]
            if isinstance(one, ast.ClassDef) and one.name == base.__name__
        )
        for field, after in zip(node.body, node.body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = getattr(getattr(after, "value", None), "value", None)
                found[field.target.id] = " ".join(text.split()) if isinstance(text, str) else ""
    return found


def frozen() -> str:
    """Every option of every command with what it takes and its default."""
    lines = [
        f"{command} {option.name}: {option.takes} = {option.default}"
        for command, kind in COMMANDS.items()
        for option in options(kind)
    ]
    return "".join(f"{line}\n" for line in lines)


def page() -> str:
    """The reference: a section for each class of settings, and the commands' own options after them."""
    seen: set[str | type] = set()
    text = _HEAD
    for command, kind in COMMANDS.items():
        groups: dict[str, list[Option]] = {}
        for option in options(kind):
            groups.setdefault(option.name.rpartition(".")[0].removeprefix("--"), []).append(option)
        for section, members in groups.items():
            key = section or command
            if {key, members[0].home} & seen:
                continue
            seen |= {key, members[0].home}
            text += f"\n## {key}\n\n{_purpose(members[0].home)} {WHEN[key]}\n"
            text += "\n| option | takes | default | what it does |\n| --- | --- | --- | --- |\n"
            for option in members:
                cells = (f"`{option.name}`", option.takes, f"`{option.default}`", option.explanation)
                text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def _purpose(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


if __name__ == "__main__":
    OPTIONS.write_text(frozen())
    PAGE.write_text(page())
