"""The command `harmonica`, and what it says where an extra is missing."""

import re
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from torch._dynamo.utils import counters

import harmonica
from harmonica.__main__ import COMMANDS, main
from harmonica.validation.extras import MissingExtra, need
from tests.integrations.test_attach_readme import write_folder

NO_COMMANDS = {"common", "check_reference", "sample_command", "training_folder"}
"""Modules beside those of the commands."""


def test_each_command_has_a_module_and_a_purpose(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    folder = Path(harmonica.__file__).parent / "cli"
    assert {path.stem for path in folder.glob("[a-z]*.py")} - NO_COMMANDS == COMMANDS.keys()
    assert all(name in said and purpose in said for name, purpose in COMMANDS.items())


def test_an_unknown_command_is_refused(capsys):
    assert main(["paint"]) == 2
    assert "command is 'paint': give one of train, sample, apply" in capsys.readouterr().err


def test_a_command_gets_its_options(tmp_path, capsys):
    assert main(["memory", "nonsense", "--batch-size=2"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["memory", "dit-xl-2-256", "--batch-size=2"]) == 0
    assert "| dit-xl-2-256 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "imported", "extra"),
    [
        ("tyro", "harmonica.cli", "cli"),
        ("ray", "pipelines", "ray"),
        ("mlflow", "pipelines.tracking", "mlflow"),
        ("fastapi", "pipelines.serving", "serve"),
        ("torchmetrics", "harmonica.evaluation.image_metrics", "evaluate"),
    ],
)
def test_a_missing_extra_is_named_by_what_needs_it(monkeypatch, module, imported, extra):
    for name in [name for name in sys.modules if name == imported or name.startswith(f"{imported}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtra, match=rf"^{module} is not installed: pip install 'harmonica-ray\[{extra}\]'$"
    ):
        __import__(imported)


def test_the_command_says_which_extra_it_lacks(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("harmonica.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["sample"]) == 2
    assert "pip install 'harmonica-ray[cli]'" in capsys.readouterr().err


def test_every_extra_that_is_named_is_declared():
    root = Path(harmonica.__file__).parents[1]
    extras = set(tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {
        match[1]
        for top in ("harmonica", "pipelines")
        for path in (root / top).rglob("*.py")
        for match in re.finditer(r'need\([^)]*extra="(\w+)"\)', path.read_text())
    }
    assert named and named <= extras


def test_need_imports_nothing(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    need("this", extra="none")
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (["--router={}/router"], "two forwards: see --rounds 3"),
        (["--speedup=1.5", "--num-inference-steps=6", "--guidance-scale=3", "--rounds=2"], "even steps"),
    ],
)
def test_a_pipeline_draws_plain_and_under_a_plan(tmp_path, capsys, plan, told):
    write_folder(tmp_path)
    asked = [f"--pipeline={tmp_path / 'pipeline'}", *(each.format(tmp_path) for each in plan)]
    output = tmp_path / "both.png"
    assert main(["apply", *asked, "--prompts", "a coat", "a boot", f"--output={output}", "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "plain" in said and told in said
    fast = re.search(r"([\d.]+)x as fast; ideal speedup ([\d.]+)x", said)
    near = re.search(r"([\d.]+) dB PSNR from the plain images, mean of 2", said)
    assert fast and near and float(fast[1]) > 0 and 1 < float(fast[2]) < 3 and 5 < float(near[1]) < 100
    picture = Image.open(output)
    assert picture.size == (128, 128), "two images a row, of 64 pixels"
    assert picture.crop((0, 0, 128, 64)).tobytes() != picture.crop((0, 64, 128, 128)).tobytes()


def test_a_pipeline_is_compiled_in_both_runs(tmp_path, capsys, no_codegen):
    write_folder(tmp_path)
    asked = [f"--pipeline={tmp_path / 'pipeline'}", "--speedup=1.5", "--num-inference-steps=6"]
    asked += ["--prompts", "a coat", f"--output={tmp_path / 'both.png'}", "--device=cpu"]
    said = {}
    for execution in ("eager", "compiled"):
        assert main(["apply", *asked, f"--execution={execution}"]) == 0
        said[execution] = capsys.readouterr().out
        assert (counters["stats"]["unique_graphs"] > 0) == (execution == "compiled")
    near = [re.search(r"[\d.]+ dB", text) for text in said.values()]
    assert near[0] and near[1] and near[0][0] == near[1][0]


def test_unusable_input_to_apply_is_one_line(tmp_path, capsys):
    assert main(["apply", f"--pipeline={tmp_path}", "--router=r", "--prompts", "a coat"]) == 2
    assert "give the folder that holds model_index.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ([], "router is '' and speedup 0: give the artifact folder of a router, or a speed"),
        (["--router=r", "--speedup=2"], "router is 'r' and speedup 2"),
        (["--speedup=1"], "speedup is 1.0: give a number above 1"),
        (["--router=r", "--num-inference-steps=9"], "num_inference_steps is 9: leave it out"),
    ],
)
def test_a_plan_that_apply_cannot_use_is_one_line(tmp_path, capsys, plan, said):
    (tmp_path / "model_index.json").write_text("{}")
    assert main(["apply", f"--pipeline={tmp_path}", "--prompts", "a coat", *plan]) == 2
    assert said in capsys.readouterr().err
