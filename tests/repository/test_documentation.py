"""Every file, module, name and setting that a page, a docstring or a message mentions exists."""

import ast
import dataclasses
import io
import json
import re
import tokenize
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import harmonica
from harmonica.builtin import CHAMPION, EMOJI_CHAMPION
from harmonica.cli.apply import ApplyCommand
from harmonica.cli.convert import ConvertCommand
from harmonica.cli.sample import SampleCommand
from harmonica.cli.train import TrainCommand
from harmonica.models.dit.model import DiTConfig
from harmonica.pretraining.train_classifier import ClassifierTraining
from harmonica.version import __version__
from pipelines.capacity.command import CapacityCommand
from pipelines.config.workflow import WorkflowConfig
from pipelines.presets import PRESETS
from pipelines.pretrain.dit import DiTPretrainConfig
from pipelines.pretrain.flow_matching import FlowPretrainConfig
from pipelines.pretrain.text_to_image import TextPretrainConfig
from pipelines.serve import ServeCommand
from pipelines.ui import UiCommand

ROOT = Path(__file__).parents[2]
PACKAGES = ("harmonica", "pipelines", "cluster", "tests", "docs")
PAGES = sorted(
    path
    for folder in (ROOT, ROOT / ".github", *(ROOT / name for name in PACKAGES))
    for path in (folder.glob("*.md") if folder == ROOT else folder.rglob("*.md"))
    if path.is_file()
)
SOURCES = [ROOT / "workflow.py", *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))]
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
# Names under `harmonica.` that are tags in MLflow.
TAGS = {"harmonica.workers", "harmonica.gate"}
FILE_ENDINGS = ("py", "safetensors", "pt", "bin", "json", "png")
RELEASED = {"train_router.py", "models/router_models.py"}


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


@cache
def prose_of(path: Path) -> tuple[str, ...]:
    """A page; of a source file its comments and its strings, docstrings among them."""
    text = path.read_text()
    if path.suffix == ".md":
        return (text,)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = tuple(token.string for token in tokens if token.type == tokenize.COMMENT)
    nodes = [node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)]
    return comments + tuple(value for value in nodes if isinstance(value, str))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def code_spans(text: str) -> Iterator[str]:
    """What stands between backticks, on one line or folded onto the next."""
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        yield re.sub(r"\s+", " ", span)


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a module defines or imports at its top level, and what its classes define."""
    found: set[str] = set()
    for node in tree_of(path).body:
        for inner in (node, *(node.body if isinstance(node, ast.If) else ())):
            if isinstance(inner, ast.Import | ast.ImportFrom):
                found |= {(alias.asname or alias.name) for alias in inner.names}
            elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(inner.name)
            elif isinstance(inner, ast.Assign | ast.AnnAssign):
                targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
                found |= {name.id for one in targets for name in ast.walk(one) if isinstance(name, ast.Name)}
    return frozenset(found)


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module of ours, or something in one."""
    parts = dotted.split(".")
    if parts[0] == "harmonica_ray":  # as the wheel calls it
        parts[0] = "pipelines"
    for length in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:length])
        module = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if place.is_dir() and length == len(parts):
            return True
        if module.is_file():
            return length == len(parts) or parts[length] in names_in(module) or parts[length] == "__getattr__"
    return False


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def pages_and_sources() -> list[Path]:
    return [*PAGES, *(path for path in SOURCES if path.name != Path(__file__).name)]


def test_every_file_that_is_named_exists():
    missing = []
    names = {path.name for name in PACKAGES for path in (ROOT / name).rglob("*")}
    names |= {path.name for path in (*ROOT.iterdir(), *(ROOT / ".github").iterdir())}
    for path in pages_and_sources():
        for text in prose_of(path):
            for span in code_spans(text):
                is_ours = re.fullmatch(rf"({'|'.join(PACKAGES)}|\.github|\.ci)(/[\w.-]+)+/?", span)
                if is_ours and not (ROOT / span).exists():
                    missing.append(f"{where(path)}: {span}")
                bare = re.fullmatch(r"[\w-]+\.(py|md|yaml|toml)", span)
                if bare and span not in names | RELEASED:
                    missing.append(f"{where(path)}: {span}")
            if path.suffix == ".md":
                links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
                missing += [f"{where(path)}: {link}" for link in links if not (path.parent / link).exists()]
                for name, section in re.findall(r'^--8<-- "([^":]+):(\S+)"$', text, re.MULTILINE):
                    source = ROOT / name
                    if not source.is_file() or f"--8<-- [start:{section}]" not in source.read_text():
                        missing.append(f"{where(path)}: {name}:{section}")
    assert not missing, "\n".join(sorted(set(missing)))


def test_every_module_and_name_that_is_mentioned_exists():
    missing = []
    for path in pages_and_sources():
        for text in prose_of(path):
            mentioned = [
                match[0].rstrip(".")
                for span in code_spans(text)
                for match in re.finditer(
                    r"(?<![\w./-])(harmonica|harmonica_ray|pipelines|tests)(\.\w+)+", span
                )
            ]
            mentioned += [
                match[1] for match in re.finditer(r"-m ((?:harmonica|pipelines|tests)[\w.]*\w)", text)
            ]
            mentioned += re.findall(r"^::: (\S+)", text, re.MULTILINE)  # a page of the Python API
            for name in mentioned:
                known = name.startswith("harmonica.") and name.split(".")[1] in harmonica.__all__
                if not (known or name in TAGS or exists(name)):
                    missing.append(f"{where(path)}: {name}")
    assert not missing, "\n".join(sorted(set(missing)))


def test_every_import_of_an_example_works():
    missing = []
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                    missing += [f"{where(page)}: {name}" for name in names if not exists(name)]
    assert not missing, "\n".join(sorted(set(missing)))


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


def test_the_page_of_the_python_api_has_every_public_name_and_no_other():
    page = (ROOT / "docs/pages/reference/python-api.md").read_text()
    shown = [name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)]
    assert sorted(shown) == sorted(harmonica.__all__)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_in_a_page_or_follows_a_named_pattern(preset):
    text = "".join(page.read_text() for page in PAGES)
    assert preset in text or preset.startswith("pixart") or preset.rpartition("-")[2] in text


@pytest.mark.parametrize(
    ("page", "heading", "champion"),
    [
        ("README.md", "## Results", CHAMPION),
        ("docs/pages/benchmarks.md", "## The champion", CHAMPION),
        ("docs/pages/benchmarks.md", "## In colour", EMOJI_CHAMPION),
    ],
)
@pytest.mark.parametrize(
    ("arm", "row"), [("full", "full"), ("cached", "**l"), ("fewer_steps", "fewer steps, ")]
)
def test_results_of_a_champion_are_those_of_its_report(page, heading, champion, arm, row):
    measured = json.loads((champion / "report.json").read_text())["arms"][arm]
    lines = (ROOT / page).read_text().partition(f"\n{heading}\n")[2].splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("| | steps | s / image")) :]
    (cells,) = [line.replace("*", "") for line in table[:5] if line.startswith(f"| {row}")]
    expected = [
        str(measured["num_inference_steps"]),
        f"{measured['seconds_per_image']:.3f}",
        f"{measured['speedup']:.2f}x",
        f"{measured['label_accuracy']:.1%}",
    ]
    if arm != "full":
        decimals = 4 if arm == "cached" else 3
        expected += [f"{measured['psnr_to_full']:.1f}", f"{measured['frechet_to_full']:.{decimals}f}"]
    assert not [number for number in expected if f" {number} " not in cells]


def test_every_target_and_stage_that_is_named_exists():
    makefile, ci = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = re.search(r"^STAGES=\((.*)\)\nEXTRA=(\w+)", ci, re.MULTILINE)
    stages = {*named[1].split(), named[2]}
    assert set(re.findall(r"\bhas ([a-z]+)", ci)) == stages, "each is done"
    commands = re.findall(r'^ +stage ".*" make (.*)$', ci, re.MULTILINE)
    asked = {word for command in commands for word in command.split() if re.fullmatch(r"[a-z][a-z-]*", word)}
    assert stages - {"slow"} <= asked and "test-slow" in asked
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert set(jobs["stage"]["strategy"]["matrix"]["stage"]) == stages
    for page in PAGES:
        code = [*code_spans(page.read_text()), *re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S)]
        asked |= {name for span in code for name in re.findall(r"(?:^|\n)make ([a-z-]+)", span)}
    assert asked and asked <= targets, asked - targets


def test_the_citation_has_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    paper = citation["preferred-citation"]
    assert paper["year"] == 2025 and "2410.01723" in paper["url"] and len(paper["authors"]) == 8
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def first_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The first line of each docstring of a module, its classes and functions, with its line number."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text.splitlines()[0]


def test_docstrings_begin_with_a_short_sentence() -> None:
    """It has a verb, as far as its first word tells, ends with a stop, and fits beside a name."""
    fragment = re.compile(r"(Of|What|So|Where|As|Which|How|Who)\b")
    code = [
        path
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in ("harmonica", "pipelines", "workflow.py")
    ]
    assert len(code) > 200
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in code
        for number, line in first_lines(path)
        if len(line) >= 80 or fragment.match(line) or line[-1] not in ".:?"
    ]
    assert not wrong, "\n".join(wrong)
