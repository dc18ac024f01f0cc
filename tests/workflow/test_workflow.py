"""The chain of stages for real, from labels and from prompts, and its second run."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from listening import listeners
from processes import free_port
from tiny_dit import write_model

from harmonica.core.artifact import RouterArtifact
from harmonica.core.sampling import sample
from harmonica.data.prompt_files import MANIFEST
from harmonica.data.samples import make_samples
from harmonica.evaluation.image_metrics import psnr
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from pipelines import workflow
from pipelines.data.stream import sample_spec
from pipelines.evaluation.latency import SEED_OFFSET
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import make_client
from pipelines.tracking.mlflow_store import tracking_uri

SMALL = [
    "--sampler.num-inference-steps=6",
    "--train.trajectories=2",
    "--train.choice-trajectories=1",
    "--train.forecast.trajectories=4",
    "--train.forecast.probes=1",
    "--train.batch-size=4",
    "--evaluate.samples=16",
    "--evaluate.batch-size=8",
    "--evaluate.timing-rounds=1",
]
ONE_OF_A_KIND = ["--train.num-workers=1", "--evaluate.num-actors=1"]
"""Where their number does not matter: each takes six seconds of a core before it does anything."""
LET_THROUGH = "--promote=always"
"""What two trajectories make is not worth having."""
_DECIBELS = 0.1
"""Between two computations of one PSNR. Batches of other sizes differ by roundings, 1e-5 of an image. The
error that is measured is above 1e-3 wherever PSNR is below 60 dB, so it moves by 1%: 20 log 1.01 dB."""


def psnr_here(run: Path, arguments: list[str], sampler_name: str = "") -> float:
    """What the report's `psnr_to_full` should be, mean over its images: computed in this process.

    Args:
        sampler_name: another than the router was trained for.
    """
    config = workflow.parse(arguments, workflow.PRESETS, "workflow.py")
    model, artifact = load_model(config.model).model, RouterArtifact.load(run / "router")
    changes = {"name": sampler_name, "scheduler": None} if sampler_name else {}
    sampler = make_sampler(model, dataclasses.replace(artifact.sampler, **changes))
    spec = sample_spec(config, model, config.seed + SEED_OFFSET)
    rows = spec.to_batch(make_samples(np.arange(config.evaluate.samples), spec), "cpu")
    full, cached = (
        sample(sampler, rows.noise_NCHW, rows.condition_N, plan, reuse=artifact.reuse, keys=rows.keys)
        for plan in (None, artifact.plan)
    )
    return float(psnr(cached, full).clamp(max=100).mean())


@pytest.mark.cluster
def test_the_chain_and_its_second_run(
    private_cluster: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    model = write_model(tmp_path / "model")
    arguments = [
        "fashion",
        "--run-id=r1",
        f"--storage-path={tmp_path / 'runs'}",
        f"--model.path={model.path}",
        f"--serve.port={free_port()}",
        "--sampler.name=sa-solver",
        "--evaluate.transfer",
        "ddim",
        "dpm-solver++",
        "--evaluate.transfer-steps=9",
        "--train.targets=1.3",
        "--evaluate.num-actors=1",
        *SMALL,
    ]
    with listeners() as found:
        assert workflow.main([*arguments, "--promotion.min-psnr-to-full=99"]) == 3
    # torch's store, by which ranks find each other, takes no address: it is there while training runs.
    assert {name for name, _ in found[False]} <= {"ray::RayTrainWorker", "ray::execute"}, "see docs"
    assert {address for _, address in found[False]} <= {"::", "0.0.0.0"}, "gloo names one"
    servers = {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    assert servers <= {name for name, _ in found[True]}, "they were looked at"
    said, run = capsys.readouterr(), tmp_path / "runs" / "r1"
    assert "error: version 1 of harmonica-fashion is kept and not promoted, there is no champion" in said.err
    assert "[serve] skipped: no version of harmonica-fashion is the champion" in said.out
    decision = json.loads((run / "promotion.json").read_text())
    assert (decision["outcome"], decision["promoted"]) == ("refused", False)
    answers = {check["name"]: check["passed"] for check in decision["checks"]}
    assert (answers["psnr_to_full"], answers["reproduces"]) == (False, True)
    page = (run / "report.html").read_text()
    assert "PSNR to full is" in page and page.count("data:image/png;base64,") == 4, "also of a refused one"
    assert (run.parent / "mlartifacts").is_dir() and list(run.parent.rglob("artifacts/report.html"))

    arguments.append(LET_THROUGH)  # overruled, with the same run id
    with listeners() as found:  # the endpoint too
        assert workflow.main(arguments) == 0
    # What replicas ask each other by takes no address either, and wants Ray's token.
    assert {name.partition(":harmonica:")[0] for name, _ in found[False]} <= {"ray::ServeReplica"}
    assert "ray::ProxyActor" in {name for name, _ in found[True]}
    said = capsys.readouterr()
    assert said.out.count("done before") == 2
    assert "version 1 of harmonica-fashion is the champion" in said.out
    report = json.loads((run / "report.json").read_text())
    for key in ("cur", "ideal_speedup", "measured_speedup", "realised_share", "verdict"):
        assert key in report
    assert set(report["arms"]) == {"full", "cached", "fewer_steps", "cached 1.3x"}
    member = RouterArtifact.load(run / "family" / "1.3x")
    assert report["arms"]["cached 1.3x"]["ideal_speedup"] == member.ideal_speedup < report["ideal_speedup"]
    assert "beside it, as versions 2 (1.3x)" in said.out
    uri = tracking_uri(str(run.parent))
    assert registry.load_version("harmonica-fashion", "2", uri).plan == member.plan
    tags = make_client(uri).get_model_version("harmonica-fashion", "2").tags
    assert (tags["family"], tags[registry.GATE]) == ("1.3x", registry.NOT_ASKED)
    assert float(tags["ideal_speedup"]) == pytest.approx(member.ideal_speedup, rel=1e-4)
    assert registry.resolve("harmonica-fashion", registry.CHAMPION, uri) == "1"
    assert set(report["transfer"]) == {
        f"{name} {variant}" for name in ("ddim", "dpm-solver++", "9 steps") for variant in ("full", "cached")
    }
    transferred = report["transfer"]["dpm-solver++ cached"]["psnr_to_full"]
    assert transferred == pytest.approx(psnr_here(run, arguments, "dpm-solver++"), abs=_DECIBELS)
    for name in ("samples.png", "router.png", "served.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert (run / "router" / "sample.safetensors").exists(), "what serving holds the router to"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.json")}
    capsys.readouterr()
    assert workflow.main([*arguments, "--stages", "train", "evaluate", "register"]) == 0
    assert capsys.readouterr().out.count("done before") == 3
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.json")}


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_chain_on_prompts(
    private_cluster: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a dark boot\na pale dress\na photo of a dark boot\na bag\n" * 2)
    arguments = ["fashion-text", "--run-id=t1", f"--storage-path={tmp_path / 'runs'}", *SMALL]
    arguments += [LET_THROUGH, f"--prompts.path={prompts}", f"--serve.port={free_port()}", *ONE_OF_A_KIND]
    assert workflow.main(arguments) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "t1"
    assert json.loads((run / "prompts" / MANIFEST).read_text())["count"] == 3
    report = json.loads((run / "report.json").read_text())
    near = report["arms"]["cached"]["psnr_to_full"]
    assert near == pytest.approx(psnr_here(run, arguments), abs=_DECIBELS)
    capsys.readouterr()
    again = [*arguments, "--stages", "prompts", "train", "evaluate", "register"]
    assert workflow.main(again) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.count("done before") == 4
    assert json.loads((run / "router" / "config.json").read_text())["model"]["architecture"] == "PixArt"
    for name in ("samples.png", "router.png", "served.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
