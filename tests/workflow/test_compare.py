"""The stage `compare`: what is measured and what anew, and a small comparison for real."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tiny_dit import SHAPE, write_model
from torch import Tensor

from harmonica.data.batch import Batch
from harmonica.data.samples import SampleSpec, make_samples
from harmonica.evaluation.evaluation_report import FULL
from harmonica.models.base import BranchedTransformer
from harmonica.models.diffusers_folder import write_diffusers
from harmonica.models.dit.config import DiTConfig
from harmonica.models.loading import ModelConfig, load_model, read_model
from harmonica.samplers import SamplerConfig
from harmonica.validation.finite import NotFinite
from pipelines import workflow
from pipelines.compare.measuring import VariantWorker, reason_of
from pipelines.compare.names import OURS, PAPER
from pipelines.compare.results import Results, compared, is_complete, record
from pipelines.compare.third_party_caches import library_variants
from pipelines.config.compare import CompareConfig, free_to_change
from pipelines.evaluation.quality import NOISE_FLOOR
from pipelines.evaluation.variants import Variant
from pipelines.presets import fashion
from pipelines.run_state.resume import begin
from pipelines.run_state.storage import RunStorage
from pipelines.tracking.mlflow_runs import find_run
from tests.workflow.test_comparison_points import MISSING


def other_widths(folder: Path, **others: str) -> ModelConfig:
    """A bare checkpoint file of a shape that no table knows."""
    written = load_model(write_model(folder)).model
    torch.save(written.state_dict(), folder / "weights.pt")
    return ModelConfig(path=str(folder / "weights.pt"), shape=SHAPE, **others)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_settings_of_the_model_reach_the_libraries_variants(tmp_path: Path, dtype: str) -> None:
    config = other_widths(tmp_path, dtype=dtype)
    write_diffusers(tmp_path / "theirs", read_model(config.path, config.revision, config.shape))
    model = load_model(ModelConfig(path=str(tmp_path / "theirs"))).model  # in diffusers' convention too
    spec = SampleSpec.of(model, 0)
    batch = spec.to_batch(make_samples(np.arange(2), spec), "cpu")
    sampler = SamplerConfig(num_inference_steps=4)
    ours = Variant(FULL, sampler).sample(model, batch)
    uncached, *others = library_variants(config, sampler)
    theirs = uncached.sample(model, batch)
    assert uncached._built["module"].dtype == getattr(torch, dtype)
    if dtype == "float32":
        # Two implementations of one model: roundings, of 4 steps with 3 blocks of some 10 sums each.
        assert (theirs - ours).abs().mean() < 3 * 4 * 3 * 10 * torch.finfo(torch.float32).eps
    assert theirs.dtype == ours.dtype and 0 < (others[0].sample(model, batch) - theirs).abs().mean() < 1


class WildVariant(Variant):
    def sample(self, model: BranchedTransformer, batch: Batch) -> Tensor:
        return super().sample(model, batch) / 0


def test_a_variant_worker_measures_one_variant_after_another(tmp_path: Path) -> None:
    config = dataclasses.replace(fashion(), model=write_model(tmp_path))
    settings = dataclasses.replace(
        config.evaluate, timing_rounds=1, timing_batch_size=1, features="classifier"
    )
    worker = VariantWorker(dataclasses.replace(config, evaluate=settings), SampleSpec(0, 10, (1, 28, 28)))
    full, fewer = (
        Variant(name, SamplerConfig(num_inference_steps=n)) for name, n in ((FULL, 6), ("fewer", 2))
    )
    columns, drawn = worker.measure(full, range(2, 5), None)
    assert list(columns["index"]) == [2, 3, 4] and drawn is not None and drawn.shape == (3, 1, 28, 28)
    assert f"{NOISE_FLOOR}.pooled" in columns
    columns, kept = worker.measure(fewer, range(2, 5), drawn)
    assert kept is None and "fewer.psnr" in columns and not any(name.startswith(FULL) for name in columns)
    whole = worker.sampler.measure(make_samples(np.arange(2, 5), worker.spec), [full, fewer], {})[0]
    np.testing.assert_array_equal(columns["fewer.psnr"], whole["fewer.psnr"])
    speed, spread = worker.times(full, fewer)
    assert speed > 0 and spread == 0, "one round"
    with pytest.raises(NotFinite, match="images of variant 'wild' are not finite") as raised:
        worker.measure(WildVariant("wild", fewer.sampler), range(2), drawn[:2])
    assert reason_of(raised.value).startswith("NotFinite: images of variant 'wild' are not finite (2 of 2)")


def test_variants_may_come_and_go_and_images_may_become_more() -> None:
    before = compared(CompareConfig(samples=64))
    names = ("targets", "seeds", "learners", "published", "libraries", "samples")
    all_free = {f"compare.{name}" for name in names}
    assert free_to_change(before, compared(CompareConfig(samples=64))) == all_free
    assert free_to_change(before, compared(CompareConfig(samples=65))) == all_free
    assert free_to_change(before, compared(CompareConfig(samples=63))) == all_free - {"compare.samples"}


def test_a_run_is_resumed_with_other_variants_and_more_images_but_not_fewer(tmp_path: Path) -> None:
    storage = RunStorage(str(tmp_path), "r1")

    def taken_up(**settings: Any) -> None:
        config = dataclasses.replace(fashion(), run_id="r1", compare=CompareConfig(**settings))
        begin(config, storage)
        record(config, storage)

    taken_up(samples=64)
    Results(storage, "compare", 64).put("some", {})
    taken_up(samples=64, targets=(1.3,), seeds=2, libraries=False)
    with pytest.raises(ValueError, match=r"^compare.samples was 64 and is 32: resume run_id r1 with its"):
        taken_up(samples=32)
    taken_up(samples=128)
    with pytest.raises(ValueError, match=r"^compare.samples was 128 and is 64: "):
        taken_up(samples=64)


def test_a_comparison_is_complete_once_each_variant_asked_for_is_measured(tmp_path: Path) -> None:
    storage = RunStorage(str(tmp_path), "r1")
    config = dataclasses.replace(fashion(), run_id="r1", compare=CompareConfig(samples=64))
    assert not is_complete(config, storage)
    made = {"points": [], "compared": compared(config.compare), "not_measured": []}
    storage.write_json("comparison.json", made)
    assert is_complete(config, storage)
    assert not is_complete(dataclasses.replace(config, compare=CompareConfig(samples=65)), storage)
    storage.write_json("comparison.json", made | {"not_measured": MISSING})
    assert not is_complete(config, storage), "those are tried again"
    storage.write_json("comparison.json", {"points": []})
    storage.write_json("config.json", {"compare": compared(config.compare)})
    assert is_complete(config, storage), "of a version that kept no record"


def test_a_variant_measured_on_other_images_is_measured_anew(tmp_path: Path) -> None:
    storage = RunStorage(str(tmp_path), "r1")
    Results(storage, "compare", 64).put("cache-dit DBCache + TaylorSeer 0.05", {"point": {}})
    assert Results(storage, "compare", 64).get("cache-dit DBCache + TaylorSeer 0.05") == {"point": {}}
    assert Results(storage, "compare", 64).get("cache-dit DBCache 0.05") is None
    assert Results(storage, "compare", 65).get("cache-dit DBCache + TaylorSeer 0.05") is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"targets": (0.9,)}, r"compare.targets is \(0.9,\)"),
        ({"targets": ()}, r"compare.targets is \(\)"),
        ({"seeds": 0}, "compare.seeds is 0"),
        ({"samples": 3}, "compare.samples is 3"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CompareConfig(**changes)


def shape_flags(shape: DiTConfig) -> list[str]:
    """On the command line."""
    fields = dataclasses.asdict(shape).items()
    return ["model.shape:di-t-config", *(f"--model.shape.{k.replace('_', '-')}={v}" for k, v in fields)]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_a_small_comparison_with_a_variant_that_fails_and_its_resumes(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    broken = tmp_path / "packages" / "cache_dit"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('made for another diffusers')")
    monkeypatch.syspath_prepend(str(broken.parent))
    monkeypatch.setenv("PYTHONPATH", f"{broken.parent}:{os.environ['PYTHONPATH']}")
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    request.addfinalizer(ray.shutdown)
    model = other_widths(tmp_path / "model")
    settings = ["--compare.samples=17", "--sampler.num-inference-steps=8", "--train.trajectories=2"]
    settings += ["--train.batch-size=4", "--train.choice-trajectories=1", "--train.forecast.trajectories=4"]
    settings += ["--evaluate.timing-rounds=1", "--evaluate.batch-size=8", "--evaluate.num-actors=1"]

    def run(*arguments: str) -> int:
        command = ["fashion", "--run-id=c1", f"--storage-path={tmp_path / 'runs'}"]
        command += [f"--model.path={model.path}", "--stages", "compare", *settings, *arguments]
        return workflow.main([*command, *shape_flags(SHAPE)])

    folder = tmp_path / "runs" / "c1"

    def made() -> dict[str, Any]:
        return json.loads((folder / "comparison.json").read_text())

    def times() -> dict[Path, int]:
        files = [*folder.glob("compare/*/router.safetensors"), *folder.glob("compare/measured/*.json")]
        return {path: path.stat().st_mtime_ns for path in files}

    second_time = ("--compare.targets", "1.5", "1.3", "--compare.no-learners", "--compare.no-published")
    assert run("--compare.targets", "1.3") == 0, capfd.readouterr().err
    first = made()
    methods = {point["method"] for point in first["points"]}
    some = {OURS, PAPER, "Learning-to-Cache", "fewer steps", "random plan", "diffusers TaylorSeer"}
    assert some <= methods and any("EvenSteps" in method for method in methods)
    assert all(0 < point["psnr_to_full"] <= 100 for point in first["points"])
    planned = [point for point in first["points"] if "ideal_speedup" in point]
    # Schedules of whole steps are as fast as asked or faster.
    kinds = ("BudCache", "TeaCache", "MagCache", "DBCache", "SpeCa")
    schedules = [p for p in planned if p["method"].startswith(kinds)]
    assert len(schedules) == 6 and all(p["ideal_speedup"] > 1.28 for p in schedules)
    made_for = [point for point in planned if point not in schedules]
    assert len(made_for) == 9 + 7 and all(abs(p["ideal_speedup"] / 1.3 - 1) < 0.02 for p in made_for)
    assert (folder / "comparison.png").stat().st_size > 1000
    assert [said["target_speedup"] for said in first["speeds"]] == [1.3]
    reasons = {one["reason"] for one in first["not_measured"]}
    assert reasons == {"RuntimeError: made for another diffusers"}
    assert {one["method"].split()[0] for one in first["not_measured"]} == {"cache-dit"}
    out = capfd.readouterr().out
    assert "is first at" in out and "diffusers FirstBlockCache 0.05" in out and "HarmoniCa (paper)" in out
    assert "8 variants were not measured: cache-dit DBCache 0.05, " in out
    stage = find_run("compare", "c1", str(tmp_path / "runs"))
    assert stage is not None
    tags = stage.client.get_run(stage.mlflow_run_id).data.tags
    assert tags["harmonica.not_measured"].startswith("cache-dit DBCache 0.05, cache-dit DBCache 0.08")

    before = times()
    shutil.rmtree(broken)
    assert run(*second_time) == 0, capfd.readouterr().err
    second, after = made(), times()
    assert second["not_measured"] == [] and [said["target_speedup"] for said in second["speeds"]] == [
        1.5,
        1.3,
    ]
    assert PAPER not in {point["method"] for point in second["points"]}, "dropped"
    assert before.items() <= after.items() and len(after) > len(before), "what was measured stays"
    same = [point for point in first["points"] if point["method"] in (OURS, "fewer steps")]
    assert all(point in second["points"] for point in same)

    capfd.readouterr()
    assert run("--compare.targets", "1.3", "--compare.samples=16") == 2
    assert "compare.samples was 17 and is 16: resume run_id c1 with its own" in capfd.readouterr().err
    assert run(*second_time) == 0
    assert "[compare] done before" in capfd.readouterr().out
    (folder / "comparison.json").unlink()  # killed just before the end
    assert run(*second_time) == 0
    assert made()["points"] == second["points"] and times() == after
