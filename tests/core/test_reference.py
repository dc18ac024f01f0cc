"""The numbers of the released code, and what the command says when they, or their folder, are not right."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CASE = Path(__file__).parents[1] / "assets" / "case_a"
INPUTS = {"noise", "labels", "sdt.noise", "sdt.labels"}


@pytest.fixture
def run_command(monkeypatch, capsys):
    """`python -m harmonica.cli.check_reference ...`, without a new process's import of torch."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reference", *map(str, arguments)])
        monkeypatch.delitem(sys.modules, "harmonica.cli.check_reference", raising=False)
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_module("harmonica.cli.check_reference", run_name="__main__")
        return (exit_info.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def small_case(tmp_path):
    """A case that records the two DDIM keys alone, so that it is checked in a moment."""
    folder = shutil.copytree(CASE, tmp_path / "case")
    recorded = load_file(folder / "golden.safetensors")
    keys = ("noise", "labels", "ddim.full", "ddim.cached")
    save_file({key: recorded[key] for key in keys}, folder / "golden.safetensors")
    return folder


def change(path: Path, key: str, index: tuple[int, ...], change_by: float) -> None:
    recorded = load_file(path)
    recorded[key][index] += change_by
    save_file(recorded, path)


@pytest.mark.numeric
def test_every_recorded_key_agrees(run_command):
    code, out, _ = run_command(CASE)
    errors = {line.split()[0]: float(line.split()[1]) for line in out.splitlines()}
    assert set(errors) == set(load_file(CASE / "golden.safetensors")) - INPUTS
    assert len(out.splitlines()) == len(errors) == 17
    assert max(errors.values()) <= 1e-5
    assert code == 0


def test_only_what_is_recorded_is_computed_and_one_changed_digit_is_found(run_command, small_case):
    assert run_command(small_case)[0] == 0
    change(small_case / "golden.safetensors", "ddim.full", (1, 2, 3, 4), 0.1)
    code, out, _ = run_command(small_case)
    assert code == 1
    assert [(line.split()[0], line.split()[2]) for line in out.splitlines()] == [
        ("ddim.full", "DIFFERS"),
        ("ddim.cached", "ok"),
    ]
    assert run_command(small_case, "--tolerance", "0.1")[0] == 0


def test_inputs_of_keys_that_are_not_recorded_are_not_needed(run_command, small_case):
    recorded = load_file(CASE / "golden.safetensors")
    save_file({"plan.compute": recorded["plan.compute"]}, small_case / "golden.safetensors")
    code, out, _ = run_command(small_case)
    assert (code, out.split()) == (0, ["plan.compute", "0.000e+00", "ok"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_recorded_value_that_is_not_a_number_differs(run_command, small_case, value):
    change(small_case / "golden.safetensors", "ddim.full", (0, 0, 0, 0), value)
    assert run_command(small_case)[0] == 1


@pytest.mark.parametrize("name", ["case.json", "dit_official.pt", "router_official.pt", "golden.safetensors"])
def test_a_folder_that_lacks_a_file_is_unusable(run_command, small_case, name):
    (small_case / name).unlink()
    code, out, err = run_command(small_case)
    assert (code, out) == (2, "")
    assert f"has no {name}" in err


def test_a_folder_that_lacks_an_input_or_a_setting_is_unusable(run_command, small_case):
    golden = small_case / "golden.safetensors"
    recorded = load_file(golden)
    save_file({"ddim.full": recorded["ddim.full"], "labels": recorded["labels"]}, golden)
    code, _, err = run_command(small_case)
    assert code == 2
    assert "'noise'" in err
    (small_case / "case.json").write_text('{"model": {"input_size": 8}}')
    code, _, err = run_command(small_case)
    assert code == 2
    assert "'patch_size'" in err


def test_a_case_with_an_unknown_key_or_none_is_not_passed(run_command, small_case):
    golden = small_case / "golden.safetensors"
    recorded = load_file(golden)
    inputs = {key: recorded[key] for key in ("noise", "labels")}
    save_file(inputs | {"ddpm.full": recorded["ddim.full"]}, golden)
    code, _, err = run_command(small_case)
    assert code == 2
    assert "ddpm.full" in err
    save_file(inputs, golden)
    code, _, err = run_command(small_case)
    assert code == 2
    assert "nothing to compare" in err


def test_a_router_that_would_execute_code_is_refused(run_command, small_case, make_bomb):
    bomb, marker = make_bomb
    torch.save({"routers": bomb(), "opt": {}}, small_case / "router_official.pt")
    code, _, err = run_command(small_case)
    assert code == 2
    assert "holds more than tensors and is refused" in err
    assert not marker.exists()
    torch.load(small_case / "router_official.pt", weights_only=False)
    assert marker.exists(), "the pickle was harmless, so refusing it proved nothing"
