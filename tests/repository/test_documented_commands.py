"""Every command and example of README and docs is run, read by its own parser, or listed with its needs."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from all_phases import ALL_PHASES
from live_app import running
from tiny_engine import make_engine
from tiny_recorded_pipelines import make_case

import harmonica
from harmonica.builtin import CHAMPION
from harmonica.cli import train
from harmonica.cli.apply import ApplyCommand
from harmonica.cli.common import parse, parse_settings
from harmonica.cli.convert import ConvertCommand
from harmonica.cli.sample import SampleCommand
from harmonica.core.artifact import RouterArtifact
from harmonica.models.loading import ModelConfig, load_model
from harmonica.training.presets import RECIPES
from pipelines.capacity.command import CapacityCommand
from pipelines.presets import PRESETS
from pipelines.serve import ServeCommand
from pipelines.serving.images_api import create_app
from tests.integrations.test_pipeline_training import prompts_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "cluster/README.md", *sorted((ROOT / "docs/pages").rglob("*.md"))]
TRAIN_PRESETS = {name: partial(train._preset, recipe) for name, recipe in RECIPES.items()}
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "workflow.py": lambda given: parse(given, PRESETS, "workflow.py"),
    "-m harmonica.cli.train": lambda given: parse(given, TRAIN_PRESETS, "train"),
    "-m harmonica.cli.sample": lambda given: parse_settings(SampleCommand, given, "sample"),
    "-m pipelines.serve": lambda given: parse_settings(ServeCommand, given, "serve"),
    "-m harmonica.cli.convert": lambda given: parse_settings(ConvertCommand, given, "convert"),
    "-m pipelines.capacity": lambda given: parse_settings(CapacityCommand, given, "capacity"),
    "harmonica apply": lambda given: parse_settings(ApplyCommand, given, "apply"),
}
"""Programs of ours: what follows their name is read by their own parser."""
RUN_BY = {
    "python -m harmonica.cli.check_reference tests/assets/case_a": (
        "core/test_reference.py",
        "check_reference",
    ),
    "ray start --head": ("nodes/conftest.py", "LocalCluster("),
    "ray job submit": ("nodes/test_stopping.py", '"submit", f"--working-dir'),
    "python cluster/local_cluster.py": ("nodes/conftest.py", "LocalCluster("),
    "python cluster/mlflow_server.py": ("workflow/test_workflow_stores.py", "MlflowServer("),
    "curl -s http://127.0.0.1:8000/v1/images/generations": (
        "repository/test_documented_commands.py",
        "test_the_endpoint",
    ),
}
"""Beginning of a command -> the test file that runs it, and a word of that."""
NEEDS = {
    "pip install": "the package index",
    "source .venv/bin/activate": "an interactive shell",
    "export ": "a shell; a name and a value",
    "podman build": "podman and the package index",
    "kubectl ": "a Kubernetes cluster; test_cluster_files.py checks the manifests",
    "ray get-auth-token": "a home folder that it may write to",
    "chmod 600 ~/.ray/auth_token": "what the command before it writes",
    "ray up cluster/ray-up": "machines reached over SSH; test_ray_up_and_monitoring.py checks the file",
    "ray dashboard cluster/ray-up": "the same",
    "ray down cluster/ray-up": "the same",
}
"""Beginning of a command that no test runs -> what it needs."""
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands_of(page: Path) -> Iterator[str]:
    """Each command on one line, without comments, variables before it, and where the environment lies."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            command = re.sub(r"\s+#.*$|\s*&\s*(#.*)?$", "", line).strip()
            command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command).replace(".venv/bin/", "", 1)
            if line.startswith("source"):
                command = line
            if command:
                yield command


COMMANDS = [(page.relative_to(ROOT), command) for page in PAGES for command in commands_of(page)]


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_there_are_commands_in_the_pages_that_have_some():
    assert {str(page) for page, _ in COMMANDS} >= {
        "README.md",
        "cluster/README.md",
        "docs/pages/guides/first-run.md",
        "docs/pages/guides/own-model.md",
        "docs/pages/guides/without-ray.md",
    }


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=str)
def test_a_command_is_read_by_its_parser_or_is_listed(page, command):
    listed = [start for start in (*RUN_BY, *NEEDS) if command.startswith(start)]
    target = re.fullmatch(r"make ([a-z-]+)", command)
    ours = [
        (parser, command.partition(f"{name} ")[2])
        for name, parser in PARSERS.items()
        if f"{name} " in f"{command} "
    ]
    assert listed or target or ours, f"{page}: list what runs it, or what it needs"
    if target:
        assert target[1] in TARGETS
    for parser, arguments in ours:
        if arguments.endswith("--help"):
            continue  # prints, and ends the program
        parser(shlex.split(arguments.replace("$PWD", "/folder")))
    for start in listed:
        if start in RUN_BY:
            name, word = RUN_BY[start]
            assert word in (ROOT / "tests" / name).read_text()


def test_what_is_listed_is_in_a_page():
    unused = [
        start for start in (*RUN_BY, *NEEDS) if not any(command.startswith(start) for _, command in COMMANDS)
    ]
    assert not unused


def test_every_example_is_run_by_a_test():
    """`harmonica.apply` by test_attach_readme.py, `images.edit` by test_image_edits.py, the others below."""
    keys = ("harmonica.apply(", "harmonica.train_pipeline(", "CHAMPION", "OpenAI(", "images.edit(")
    for page in PAGES:
        for block in blocks_of(str(page.relative_to(ROOT))):
            assert any(key in block for key in keys), f"{page}:\n{block}"


def test_the_example_without_a_pipeline_runs():
    (example,) = [block for block in blocks_of("docs/pages/guides/diffusers.md") if "CHAMPION" in block]
    names: dict[str, object] = {}
    exec(example, names)
    images = names["images"]
    assert isinstance(images, torch.Tensor) and images.shape == (4, 1, 28, 28) and images.isfinite().all()


def test_the_training_in_a_pipeline_runs(tmp_path, monkeypatch):
    """On a tiny FLUX, with its own prompts and arguments, and few trajectories."""
    monkeypatch.setattr("harmonica.pipeline_training.train.learned_steps", lambda: ALL_PHASES)
    (example,) = [
        block for block in blocks_of("docs/pages/guides/diffusers.md") if "train_pipeline(" in block
    ]
    case = make_case("flux")
    prompts, call = prompts_of(case)
    changes = {
        r'\["a harmonica on a table".*\]': "prompts",
        r"call=\{.*\}": "call=call",
        r'"router"': "folder",
    }
    for pattern, replacement in changes.items():
        example, count = re.subn(pattern, replacement, example)
        assert count == 1, pattern
    names = {"harmonica": harmonica, "pipe": case.pipe, "prompts": prompts, "call": call}
    exec(example, names | {"folder": tmp_path / "router"})
    harmonica.apply(case.pipe, tmp_path / "router")


def test_the_endpoint_answers_the_examples(capsys):
    """The curl command and the OpenAI client of the page on serving, with another port."""
    page = "docs/pages/guides/serve.md"
    (curl,) = [command for command in commands_of(ROOT / page) if command.startswith("curl")]
    (client,) = [block for block in blocks_of(page) if "OpenAI(" in block]
    artifact = RouterArtifact.load(CHAMPION)
    engine = make_engine(load_model(ModelConfig()), artifact, name="harmonica-fashion")
    place = "http://127.0.0.1:8000/"
    assert place in curl and place in client
    with running(create_app(engine)) as url:
        done = subprocess.run(
            curl.replace(place, url), shell=True, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.count('"b64_json"') == 2, done.stdout[:500]
        exec(client.replace(place, url), {})
    said = capsys.readouterr().out.split()
    assert said.count("image_generation.partial_image") == 3 and said[-1] == "image_generation.completed"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """`make docs`, if its packages are installed: links, anchors, pictures and included sections exist."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "docs/mkdocs.yml"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], capture_output=True, text=True, timeout=250, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for name in ("index", "experiments", "reference/http-api", "reference/python-api"):
        assert (tmp_path / f"{name}.html").is_file()
    assert "/v1/images/generations" in (tmp_path / "reference/http-api.html").read_text()
