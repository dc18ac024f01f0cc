"""The preset `pipeline` without Ray: a router is trained, judged, drawn again and gone on with."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipeline_folder import SIZE, make_pipeline

import harmonica
from harmonica.data.embedding_store import EmbeddingManifest
from harmonica.data.prompt_files import MANIFEST, part_path
from harmonica.data.samples import Shard
from harmonica.evaluation.evaluation_report import CACHED, FULL
from harmonica.evaluation.image_metrics import psnr
from harmonica.pipeline_training.sampling import sample_pipeline
from harmonica.training import time_budget
from harmonica.training.budget import with_numbers
from harmonica.training.phases import all_phase_costs
from pipelines import workflow
from pipelines.config.workflow import WorkflowConfig
from pipelines.data.embed_for_pipeline import PipelinePartWriter
from pipelines.evaluation.latency import SEED_OFFSET
from pipelines.evaluation.open_model import open_model
from pipelines.evaluation.quality import VariantSampler
from pipelines.evaluation.variants import make_variants
from pipelines.run_state.storage import RunStorage
from pipelines.tracking import worker_times
from pipelines.training import run_recorder, stage
from pipelines.training.jobs import build_artifacts, opened_job
from tests.workflow.test_pipeline_workflow import PROMPTS, TRAJECTORIES, _arguments, _NoTimes, _trained


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> WorkflowConfig:
    """A run whose stage prompts is done, here and without Ray."""
    made = workflow.Workflow(workflow.parse(_arguments(folder, tmp_path), workflow.PRESETS, "workflow.py"))
    made.check()
    writer = PipelinePartWriter(made.config, made.storage.uri("prompts"))
    writer.storage.write_bytes(part_path("all"), writer.content(list(PROMPTS)))
    manifest = EmbeddingManifest(
        pipeline={},
        dtype="float32",
        max_sequence_length=16,
        negative_prompt="",
        names=["prompt_embeds"],
        count=len(PROMPTS),
        parts=[["all", len(PROMPTS)]],
    )
    writer.storage.write_json(MANIFEST, dataclasses.asdict(manifest))
    return made.config


def test_a_router_is_judged_by_what_apply_makes_of_the_whole_pipeline(config: WorkflowConfig) -> None:
    artifact = _trained(config)
    assert 0 < artifact.plan.cur < 1
    model = open_model(config, torch.device("cpu"))
    rows = model.rows(config.seed + SEED_OFFSET)
    full, cached = make_variants(config, artifact)[:2]
    batch = rows.to_batch(rows.make(np.arange(3)), "cpu")
    images = {one.name: model.sample(one, batch) for one in (full, cached, full)}
    whole = make_pipeline()
    call = {"num_inference_steps": 4, "height": SIZE, "width": SIZE, "guidance_scale": 3.0}
    call |= {"negative_prompt": "", "max_sequence_length": 16}

    def drawn() -> torch.Tensor:
        seed = config.seed + SEED_OFFSET
        return sample_pipeline(whole, call, PROMPTS, range(3), seed=seed, output_type="pt") * 2 - 1

    # Prompts are encoded one by one there and together here.
    torch.testing.assert_close(images[FULL], drawn(), rtol=0, atol=1e-4)
    harmonica.apply(whole, artifact)
    torch.testing.assert_close(images[CACHED], drawn(), rtol=0, atol=1e-4)
    assert (images[CACHED] - images[FULL]).abs().max() > 1e-3, "the plan changes the images"
    columns = VariantSampler(config, rows, [full, cached])(rows.make(np.arange(3)))
    np.testing.assert_allclose(columns["cached.psnr"], psnr(images[CACHED], images[FULL]).numpy(), rtol=1e-3)
    assert (columns["label"] == -1).all() and columns["cached.ssim"].shape == (3,)


def test_a_worker_leaves_the_routers_of_all_speeds(config: WorkflowConfig) -> None:
    train = dataclasses.replace(config.train, targets=(1.2,), trajectories=1)
    config = dataclasses.replace(config, train=train)
    storage, shard = RunStorage(config.storage_path, config.run_id), Shard(config.train.batch_size)
    with opened_job(config, torch.device("cpu"), shard) as job:
        metrics = list(job.trained(shard, _NoTimes(), lambda _: None))  # type: ignore[arg-type]
        job.leave(config, storage)
    assert [each["target_speedup"] for each in metrics] == [1.4, 1.2]
    main, family = build_artifacts(config, storage)
    assert main.ideal_speedup == pytest.approx(1.4, rel=0.02) and list(family) == ["1.2x"]
    assert family["1.2x"].ideal_speedup == pytest.approx(1.2, rel=0.02)
    assert family["1.2x"].training["target_speedup"] == 1.2


def test_a_golden_sample_is_drawn_again_and_another_plan_is_not(config: WorkflowConfig) -> None:
    artifact = _trained(config)
    model = open_model(config, torch.device("cpu"))
    recorded = model.record_sample(artifact)
    assert recorded.sample_CHW is not None and recorded.sample_CHW.isfinite().all()
    open_model(config, torch.device("cpu")).check_sample(recorded)
    other = dataclasses.replace(recorded, logits_TB=-recorded.logits_TB.abs())
    with pytest.raises(ValueError, match=r"differs by .* from the one recorded with it"):
        model.check_sample(other)


def test_a_target_out_of_reach_is_told_when_the_pipeline_is_recorded(config: WorkflowConfig) -> None:
    train = dataclasses.replace(config.train, target_speedup=90.0)
    with (
        pytest.raises(ValueError, match=r"train.target_speedup is 90.0: 4 steps .* at most"),
        opened_job(dataclasses.replace(config, train=train), torch.device("cpu"), Shard(2)),
    ):
        pass


class _Deaf:
    """Takes whatever it is told: a board of the watchdog, a client of MLflow, a gauge, a log of metrics."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.mlflow_run_id = ""

    def __getattr__(self, name: str) -> Any:
        return _Deaf()

    def __call__(self, *_: Any, **__: Any) -> Any:
        return []


class _Killed(Exception):
    pass


@pytest.mark.parametrize("more", [0, 2])
def test_a_worker_goes_on_from_its_checkpoint_and_leaves_the_router(
    config: WorkflowConfig, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """Also where a budget allows `more` trajectories than are set; a full sampling is timed once."""
    reported: list[int] = []
    wanted = dataclasses.replace(config, train=with_numbers(config.train, {"router": TRAJECTORIES + more}))
    if more:
        phases = all_phase_costs(wanted.train, config.sampler.num_inference_steps, from_start=True)
        minutes = 1000 * sum(sum(phase.costs) for phase in phases) / 60 / 0.9 + 1
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, budget=minutes))
        timed = iter([1000.0])
        monkeypatch.setattr(time_budget, "sampling_seconds", lambda *_: next(timed))

    def report(metrics: dict[str, float]) -> None:
        reported.append(int(metrics["trajectory"]))
        if reported == [1, 2, 3]:
            raise _Killed

    alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(stage.ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(stage.ray.train, "report", report)
    monkeypatch.setattr(stage.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(stage.ray.train.collective, "broadcast_from_rank_zero", lambda found: found)
    monkeypatch.setattr(stage.ray, "get", lambda found: found)
    monkeypatch.setattr(stage, "worker_nodes", lambda _: ["here"])
    monkeypatch.setattr(run_recorder, "MetricLog", _Deaf)
    monkeypatch.setattr(worker_times, "Gauge", _Deaf)
    job = {"config": config, "mlflow": _Deaf(), "board": _Deaf()}
    with pytest.raises(_Killed):
        stage._train_loop(job)
    stage._train_loop(job)
    assert reported == list(range(1, TRAJECTORIES + more + 1))
    left, family = build_artifacts(config, RunStorage(config.storage_path, config.run_id))
    assert torch.equal(left.logits_TB, _trained(wanted).logits_TB) and not family
    assert left.training["run_id"] == "p1" and left.training["trajectories"] == TRAJECTORIES + more
