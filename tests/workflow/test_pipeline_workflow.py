"""The chain of the preset `pipeline`: any text-to-image pipeline of diffusers, from prompts to a champion."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from processes import free_port
from tiny_pipeline_folder import SIZE

from harmonica.core.artifact import RouterArtifact
from harmonica.data.samples import Shard
from harmonica.evaluation.image_metrics import psnr
from harmonica.integrations.recorded.kinds import KINDS
from pipelines import workflow
from pipelines.config.workflow import WorkflowConfig
from pipelines.data.pipeline_prompts import open_prompts
from pipelines.evaluation.latency import SEED_OFFSET
from pipelines.evaluation.open_model import open_model
from pipelines.evaluation.variants import make_variants
from pipelines.run_state.storage import RunStorage
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_run
from pipelines.tracking.mlflow_store import tracking_uri
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.jobs import opened_job

ROOT = Path(workflow.__file__).parents[1]
PROMPTS = ("a red cat", "the moon", "a blue dog on the moon")
TRAJECTORIES = 6
SMALL = [
    "--model.dtype=float32",
    "--prompts.dtype=float32",
    "--sampler.num-inference-steps=4",
    f"--pipeline.height={SIZE}",
    f"--pipeline.width={SIZE}",
    "--pipeline.guidance-scale=3",
    "--pipeline.max-sequence-length=16",
    "--pipeline.cacheable",
    *KINDS,  # speeds of four steps then come in small jumps
    "--train.target-speedup=1.4",
    "--train.initial=even",
    "--train.start-trajectories=0",
    "--train.choice-trajectories=0",
    "--train.forecast.trajectories=0",
    "--train.iepo=none",
    f"--train.trajectories={TRAJECTORIES}",
    "--train.batch-size=2",
    "--train.checkpoint-interval-s=0",
    "--evaluate.samples=16",
    "--evaluate.batch-size=8",
    "--evaluate.timing-rounds=1",
    "--evaluate.num-actors=1",
    "--evaluate.resamples=0",
]


def _arguments(folder: Path, place: Path) -> list[str]:
    place.mkdir(parents=True, exist_ok=True)
    prompts = place / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, "", PROMPTS[0]]) + "\n")
    given = [f"--model.path={folder}", f"--prompts.path={prompts}", f"--storage-path={place / 'runs'}"]
    return ["pipeline", *given, "--run-id=p1", *SMALL]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--model.path="], ["model.path is ''", "give the folder of a diffusers pipeline"]),
        (["--model.path=builtin:fashion-dit"], ["has no readable model_index.json", "save_pretrained"]),
        (["--prompts.path="], ["prompts.path is ''", "give a .txt or .parquet file"]),
        (["--pipeline.true-cfg-scale=2"], ["pipeline.true_cfg_scale is 2", "leave it out"]),
        (["--sampler.guidance-scale=3"], ["sampler.guidance_scale is 3", "give pipeline.guidance_scale"]),
        (["--sampler.name=ddim"], ["sampler.name is ddim", "give diffusers"]),
        (["--prompts.max-tokens=8"], ["prompts.max_tokens is 8", "give pipeline.max_sequence_length"]),
        (["--model.execution=compiled"], ["model.execution is compiled", "give eager"]),
        (["--evaluate.transfer-steps=9"], ["evaluate.transfer_steps is (9,)", "leave it out"]),
        (["--evaluate.features=classifier"], ["evaluate.features is 'classifier'", "leave it out"]),
        (["--evaluate.lpips-path=/no/such"], ["/no/such does not exist"]),
        (["--train.shard-model"], ["train.shard_model is True", "give False"]),
        (["--stages", "prompts", "sweep"], ["stages is ('prompts', 'sweep')", "leave it out"]),
        (["--stages", "train"], ["no embedded prompts yet", "add the stage prompts before train"]),
        (["--stages", "prompts", "evaluate"], ["no router yet", "add the stage train before evaluate"]),
        (["--stages", "prompts", "train", "register"], ["promote is 'gate'", "add the stage evaluate"]),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    changes: list[str], words: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert workflow.main([*_arguments(folder, tmp_path), *changes]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    for word in words:
        assert word in error
    assert not ray.is_initialized()


QUALITY = ["--train.target-psnr=30", "--train.initial=measured", "--train.start-trajectories=1"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([], "a ChromaPipeline without a VAE, which decodes its latents: give the folder with vae/"),
        (
            ["--stages", "prompts", "train", "--train.target-speedup=0", *QUALITY],
            "train.target_psnr is 30.0: the model draws latents",
        ),
    ],
)
def test_a_pipeline_without_a_decoder_is_refused_before_any_work(
    changes: list[str], words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    (bare / "transformer").mkdir(parents=True)
    index = json.loads((folder / "model_index.json").read_text())
    (bare / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    config = (folder / "transformer" / "config.json").read_bytes()
    (bare / "transformer" / "config.json").write_bytes(config)
    assert workflow.main([*_arguments(bare, tmp_path / "run"), *changes]) == 2
    assert words in capsys.readouterr().err and not ray.is_initialized()


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff\n"])
def test_an_empty_prompts_file_is_refused(
    text: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(folder, tmp_path)
    (tmp_path / "prompts.txt").write_text(text)
    assert workflow.main(arguments) == 2
    assert "holds no prompts: give at least one line of text" in capsys.readouterr().err


class _NoTimes:
    """Takes no times."""


def _trained(config: WorkflowConfig) -> RouterArtifact:
    shard = Shard(config.train.batch_size)
    with opened_job(config, torch.device("cpu"), shard) as job:
        for _ in job.trained(shard, _NoTimes(), lambda _: None):  # type: ignore[arg-type]
            pass
        return job.run.artifact()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_the_chain_goes_on_after_an_interruption_and_ends_in_a_version_that_apply_takes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    arguments = [*_arguments(folder, tmp_path), f"--serve.port={free_port()}"]
    storage = RunStorage(str(tmp_path / "runs"), "p1")
    _interrupt(arguments, storage, tmp_path / "log")
    before = int(Checkpoints.of_training(storage).last()[:9])
    assert 0 < before < TRAJECTORIES
    try:
        assert workflow.main([*arguments, "--promote=always"]) == 0, capsys.readouterr().err
    finally:
        ray.shutdown()
    said = capsys.readouterr().out
    assert f"[prompts] {len(PROMPTS)} prompts, done before" in said
    assert re.search(r"\[serve\] http://127.0.0.1:\d+ generated 'a red cat'", said), said
    config = workflow.parse(arguments, workflow.PRESETS, "workflow.py")
    uri = tracking_uri(config.storage_path)
    artifact, version = registry.load("harmonica-pipeline", registry.CHAMPION, uri)
    assert version == "1" and artifact.training["run_id"] == "p1"
    run = find_run("train", "p1", config.storage_path)
    assert run is not None
    assert [step for step, _ in run.history("loss")] == list(range(1, TRAJECTORIES + 1)), "each just once"
    # Two workers and an interruption change the order of sums.
    torch.testing.assert_close(artifact.logits_TB, _trained(config).logits_TB, rtol=0, atol=1e-3)
    report = json.loads((tmp_path / "runs" / "p1" / "report.json").read_text())
    assert report["samples"] == 16
    assert report["arms"]["cached"]["psnr_to_full"] == pytest.approx(_psnr_here(config, artifact), abs=0.1)
    assert {"ssim_to_full", "speedup", "seconds_per_image"} <= set(report["arms"]["cached"])
    for name in ("samples.png", "router.png", "report.html", "served.png"):
        assert (tmp_path / "runs" / "p1" / name).exists()


def _interrupt(arguments: list[str], storage: RunStorage, log: Path) -> None:
    """Run the command until its training has left a checkpoint, and stop it as a scheduler does."""
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "tests/support")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "workflow.py"), *arguments, "--promote=always"]
    with log.open("w") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        checkpoints, deadline = Checkpoints.of_training(storage), time.monotonic() + 400
        while not storage.names(checkpoints.folder):
            assert driver.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 143, log.read_text()[-3000:]
    finally:
        driver.kill()


def _psnr_here(config: WorkflowConfig, artifact: RouterArtifact) -> float:
    model = open_model(config, torch.device("cpu"))
    rows = model.rows(config.seed + SEED_OFFSET)
    batch = rows.to_batch(rows.make(np.arange(16)), "cpu")
    full, cached = (model.sample(one, batch) for one in make_variants(config, artifact)[:2])
    assert len(open_prompts(config)) == len(PROMPTS)
    return float(psnr(cached, full).clamp(max=100).mean())
