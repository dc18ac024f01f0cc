"""`make bench`: arms in turn, rows as bench.json has them, and what they run on."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_dit import SHAPE

from tests.benchmarks import comparisons as bench
from tests.benchmarks import gpu, training
from tests.benchmarks.arms import make_dit
from tests.benchmarks.hardware import Hardware
from tests.benchmarks.timing import Aim, Row, Timing, time_arms


def test_arms_take_turns_after_a_warm_up():
    calls: list[str] = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = time_arms(arms, rounds=3)
    assert "".join(calls) == "abababab" and list(timings) == ["a", "b"]


def test_the_median_and_the_spread_of_the_rounds():
    waits = iter((0.0, 0.01, 0.09, 0.03))  # the first is for warmth
    (timing,) = time_arms({"sleep": lambda: time.sleep(next(waits))}, rounds=3).values()
    assert 0.03 <= timing.median_s < 0.09 and timing.spread_s >= 0.07


def test_a_row_is_held_against_its_aim():
    arms = {"ours": Timing(1.0, 0.1)}
    assert Row.judge("what", arms, 0.5, "of theirs", Aim("<=", 0.55)).holds
    assert not Row.judge("what", arms, 0.9, "realised share", Aim(">=", 0.95)).holds


def test_a_cpu_has_one_kind_of_arms_unless_more_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Hardware.here() == [Hardware("cpu", torch.float32, False)]
    asked = Hardware.here(["float32", "bfloat16"], compiled=True)
    assert asked == [Hardware("cpu", dtype, True) for dtype in (torch.float32, torch.bfloat16)]
    assert str(asked[1]) == "CPU, bfloat16, compiled"


def test_a_gpu_has_eager_and_compiled_ones(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert [str(each) for each in Hardware.here()] == ["H200, bfloat16, eager", "H200, bfloat16, compiled"]
    assert all(each.is_gpu for each in Hardware.here())


def test_a_model_is_placed_as_it_would_be_loaded():
    model = Hardware(dtype=torch.bfloat16).place(make_dit(SHAPE))
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.final_layer.parameters()} == {torch.float32}
    labels = torch.tensor([1, 2])
    images = model(torch.randn(2, model.in_channels, *2 * [model.sample_size]), labels, labels)
    assert images.isfinite().all() and images.dtype == torch.float32


def test_rows_say_what_they_ran_on(monkeypatch):
    def placed(*, whole: bool, hardware: Hardware) -> Iterator[Row]:
        yield Row.judge("share", {}, 1.0, "x", Aim(">=", 1.0))

    monkeypatch.setattr(bench, "PLACED", (placed,))
    (row,) = bench.run(placed, [Hardware()], whole=False)
    assert row.what == "share [CPU, float32, eager]"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants g++ on a CPU")
def test_the_command_in_half_precision_and_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "builtin_shape", lambda: SHAPE)
    how = ["--dtypes", "bfloat16", "--compile", f"--output={tmp_path / 'bench.json'}"]
    monkeypatch.setattr("sys.argv", ["tests.benchmarks", "lambda_refresh", *how])
    bench.main()
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert len(rows) == 2 and all(len(row["arms"]) == 2 for row in rows)
    assert {"what", "arms", "value", "unit", "aim", "holds", "machine"} == set(rows[0])
    assert rows[0]["what"].endswith("[CPU, bfloat16, compiled]")


def run_gpu(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "gpu.json"
    gpu.main(
        ["--device", "cpu", "--tiny", "--rounds", "1", "--batches", "2", f"--output={output}", *arguments]
    )
    found: dict[str, Any] = json.loads(output.read_text())
    return found


@pytest.fixture
def all_graphed(monkeypatch, no_codegen, host_recorder) -> None:
    """Arms are as graphed as their names say."""
    measure = gpu.measure

    def watched(arm: Any, rounds: int) -> Any:
        result = measure(arm, rounds)
        assert arm.is_graphed(), arm.name
        return result

    monkeypatch.setattr(gpu, "measure", watched)


def test_the_script_for_a_gpu_runs_on_something_small(tmp_path, monkeypatch, all_graphed, capsys):
    written: list[int] = []
    write = Path.write_text

    def watched(path: Path, text: str) -> int:
        written.append(len(json.loads(text)["arms"]))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", watched)
    found = run_gpu(tmp_path, "--sections", "dit-256", "dit-256-more")
    arms = found["arms"]
    # diffusers' own, without a plan and with one; full, and three plans held and forecast, by graphs of two
    # residual streams, then eagerly and compiled.
    assert len(arms) == 2 + (2 + 2) * (1 + 3 * 2)
    assert written == list(range(1, len(arms) + 1)), "a cut loses nothing"
    names = {(arm["name"], batch) for arm in arms for batch in (1, 8)}
    assert len(names) == 2 * len(arms) and set(gpu.REFERENCE_MS) <= names, "each number has its arm"
    assert all(arm["of_diffusers"] > 0 for arm in arms)
    assert {arm["realised_share"] is None for arm in arms if arm["ideal"] > 1} == {False}
    assert all(seconds > 0 for seconds in found["first_image"].values())
    table = capsys.readouterr().out.partition("all, each")[2]
    assert table.count("| graphed weights") == 7


def test_its_other_sections_run_too(tmp_path, all_graphed):
    others = ("flux-1024", "sdt", "caches", "pixart-1024", "dit-512", "pixart-2048", "static")
    arms = run_gpu(tmp_path, "--sections", *others)["arms"]
    assert [arm["section"] for arm in arms if arm["section"] not in ("caches",)] == (
        ["flux-1024"] * 4
        + ["sdt"] * 2
        + ["pixart-1024"] * 6
        + ["dit-512"] * 6
        + ["pixart-2048"] * 6
        + ["dit-256"] * 2
    )
    assert [arm["ideal"] > 1 for arm in arms[:4]] == [False, True] * 2, "even steps of a pipeline"
    assert {arm["name"] for arm in arms if arm["section"] == "caches"} >= {"diffusers TaylorSeer"}
    for arm in arms:
        assert (arm["updates_per_s"] is not None) == (arm["section"] == "sdt")
        assert (arm["of_diffusers"] is not None) == (arm["section"].startswith(("pixart", "dit-512")))
        assert (arm["realised_share"] is not None) == (arm["ideal"] > 1)


def test_the_script_for_a_gpu_begins_nothing_when_its_time_is_up(tmp_path, capsys):
    output = f"--output={tmp_path / 'gpu.json'}"
    gpu.main(["--device", "cpu", "--tiny", "--batches", "1", "--minutes", "-1", "--levels", "eager", output])
    assert capsys.readouterr().err.count("no time left") == len(gpu.SECTIONS)
