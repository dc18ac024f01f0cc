"""What pages say is so: the Python API, presets, results, targets, the version. And docstrings."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import harmonica
from harmonica.builtin import CHAMPION, EMOJI_CHAMPION
from harmonica.version import __version__
from pipelines.presets import PRESETS
from tests.repository.test_documentation import PAGES, ROOT, SOURCES, code_spans


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
