"""Every option and every setting that a page, a docstring or a message mentions exists."""

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator
from functools import cache

from harmonica.cli.apply import ApplyCommand
from harmonica.cli.convert import ConvertCommand
from harmonica.cli.sample import SampleCommand
from harmonica.cli.train import TrainCommand
from harmonica.models.dit.model import DiTConfig
from pipelines.capacity.command import CapacityCommand
from pipelines.config.workflow import WorkflowConfig
from pipelines.pretrain.dit import DiTPretrainConfig
from pipelines.pretrain.flow_matching import FlowPretrainConfig
from pipelines.pretrain.text_to_image import TextPretrainConfig
from pipelines.pretrain.train_classifier import ClassifierTraining
from pipelines.serve import ServeCommand
from pipelines.ui import UiCommand
from tests.repository.test_documentation import (
    ROOT,
    SOURCES,
    code_spans,
    pages_and_sources,
    prose_of,
    tree_of,
    where,
)

COMMANDS = (
    WorkflowConfig,
    TrainCommand,
    SampleCommand,
    ApplyCommand,
    ConvertCommand,
    ServeCommand,
    UiCommand,
    ClassifierTraining,
    CapacityCommand,
    DiTPretrainConfig,
    TextPretrainConfig,
    FlowPretrainConfig,
)
# Options of programs that are not ours, and those of the released scripts that the README translates.
OTHERS_OPTIONS = {
    "--no-install-recommends",
    "--address",
    "--working-dir",
    "--runtime-env-json",
    "--generate",
    "--from-literal",
    "--head",
    "--num-cpus",
    "--disable-usage-stats",
    "--experiment-id",
    "--nproc-per-node",
    "--help",
    "--no-forks",
    "--version",
    "--node-ip-address",
    "--log-level",
    "--model",
    "--image-size",
    "--num-classes",
    "--num-sampling-steps",
    "--cfg-scale",
    "--l1",
    "--lr",
    "--ste-threshold",
    "--lambda-c",
    "--max-steps",
    "--global-batch-size",
    "--global-seed",
    "--results-dir",
    "--ckpt-every",
    "--path",
    "--thres",
    "--ddim-sample",
    "--vae",
    "--accelerate-method",
    "--router",
    "--threshold",
    "--sampler",
}

FILE_ENDINGS = ("py", "safetensors", "pt", "bin", "json", "png")


def settings_of(kind: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a settings class, those of its parts included."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name}"
        yield name
        parts = (hints[field.name], *typing.get_args(hints[field.name]))
        for part in parts:
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from settings_of(part, f"{name}.")


@cache
def settings() -> frozenset[str]:
    return frozenset(settings_of(WorkflowConfig))


@cache
def options() -> frozenset[str]:
    """As the command line spells them, those of every command."""
    named = {name for command in COMMANDS for name in settings_of(command)} | {"from"}
    spelt = {f"--{name.replace('_', '-')}" for name in named}
    switches = {re.sub(r"([a-z0-9-]+)$", r"no-\1", option[2:]) for option in spelt}
    parsed = {
        argument.value
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    of_functions = {
        f"--{argument.arg.replace('_', '-')}"
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.name in ("main", "print_table")
        for argument in (*node.args.args, *node.args.kwonlyargs)
    }
    return frozenset(spelt | {f"--{name}" for name in switches} | parsed | of_functions)


def test_every_option_that_is_named_exists():
    missing = []
    for path in pages_and_sources():
        if path.parts[len(ROOT.parts)] in ("cluster", "tests") and path.suffix == ".py":
            continue  # the former's are options of Ray and PostgreSQL, the latter give wrong ones too
        for text in prose_of(path):
            if path.suffix == ".py" and re.fullmatch(r"--[a-z-]+(=.*)?", text):
                continue  # an argument for another program
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9]*(?:[.-][a-z0-9]+)*", text):
                if option not in options() | OTHERS_OPTIONS:
                    missing.append(f"{where(path)}: {option}")
    assert not missing, "\n".join(sorted(set(missing)))


def test_every_setting_that_is_named_exists():
    """Dotted settings between backticks, and at the head of a message: `train.batch_size is ...`."""
    sections = {field.name for field in dataclasses.fields(WorkflowConfig)}
    dotted = re.compile(rf"(?<![\w./-])(?:{'|'.join(sections)})(?:\.[a-z][\w-]*)+")
    known = settings() | {f"model.{name}" for name in settings_of(DiTConfig)}
    known |= {"model.weights"}  # of a model's identity, as routers record it
    missing = []
    for path in pages_and_sources():
        is_page = path.suffix == ".md"
        if not is_page and path.parts[len(ROOT.parts)] in ("tests", "cluster"):
            continue
        for text in prose_of(path):
            spans = [span.partition("=")[0] for span in code_spans(text)]
            found = [span for span in spans if dotted.fullmatch(span)]
            found += [match[0] for match in dotted.finditer(text) if text[match.end() :].startswith(" is ")]
            found = [name for name in found if name != "serve.run"]  # Ray's
            found += [
                match[1] for match in re.finditer(rf"(?:give|leave|change|--)\s?({dotted.pattern})", text)
            ]
            for name in found:
                plain = name.replace("-", "_")
                is_file = name.rpartition(".")[2] in FILE_ENDINGS
                if not is_file and plain not in known and f"--{name}" not in options():
                    missing.append(f"{where(path)}: {name}")
    assert not missing, "\n".join(sorted(set(missing)))
