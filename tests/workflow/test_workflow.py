"""The chain as a user meets it: bad input first, then the real thing, with stores here and elsewhere."""

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path
from urllib.parse import quote

import numpy as np
import postgres
import pytest
import ray
from listening import listeners
from mlflow_server import MlflowServer
from processes import free_port
from s3_server import BUCKET, SECRET, s3_server
from tiny_dit import make_artifact, write_model

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
from pipelines.run_state import resume
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import make_client
from pipelines.tracking.mlflow_store import tracking_uri

ROOT = Path(workflow.__file__).parents[1]
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fashion", "--promotion.min-speedup=0.5"], ["promotion.min_speedup is 0.5", "give 1 or more"]),
        (["fashion", "--stages", "train", "register"], ["promote is 'gate'", "add the stage evaluate"]),
        (["fashion", "--stages", "train", "register", "evaluate"], ["no evaluation before", "register"]),
        (["fashoin"], ["preset is 'fashoin'", "give one of fashion, emoji, fashion-text, dit-xl-2-256"]),
        (
            ["fashion", "--stages", "evaluate", "train"],
            ["no router yet", "add the stage train before evaluate"],
        ),
        (["fashion", "--train.target-speedup=1.01"], ["train.target_speedup is 1.01", "give 1.016 or more"]),
        (["fashion", "--train.target-speedup=inf"], ["train.target_speedup is inf", "give a number above 1"]),
        (["fashion", "--train.sdt.learning-rate=nan"], ["train.sdt.learning_rate is nan", "give a number"]),
        (["fashion", "--train.start-trajectories=-1"], ["train.start_trajectories is -1", "give 0 or more"]),
        (["fashion", "--train.targets", "1.5", "50"], ["train.targets is 50.0", "reach", "at most"]),
        (
            [
                "fashion",
                "--stages",
                "compare",
                "--compare.targets",
                "1.4",
                "10",
                "--sampler.num-inference-steps=10",
            ],
            ["compare.targets is 10.0", "10 steps", "reach", "at most"],
        ),
        (["fashion", "--stages", "sweep", "--sweep.targets", "90"], ["sweep.targets is 90.0", "at most"]),
        (["fashion", "--stages", "sweep", "--sweep.targets", "1.001"], ["sweep.targets is 1.001", "or more"]),
        (
            ["fashion", "--stages", "sweep", "--sweep.over=target_cur", "--sweep.targets", "0.99"],
            ["sweep.targets is 0.99", "to 0.95", "can reuse"],
        ),
        (
            ["fashion", "--evaluate.transfer", "diffusers"],
            ["evaluate.transfer is diffusers: leave it out", "there is no scheduler"],
        ),
        (["fashion", "--train.batch-size=3"], ["train.batch_size is 3", "give a multiple of"]),
        (["fashion", "--train.sdt.threshold=2"], ["train.sdt.threshold is 2", "between 0 and 1"]),
        (["fashion", "--sampler.num-inference-steps=1"], ["num_inference_steps is 1", "give 2 to 1000"]),
        (["fashion", "--sampler.guidance-scale=99"], ["sampler.guidance_scale is 99", "give 1 to 50"]),
        (["fashion", "--run-id=../x"], ["run_id is '../x'", "give letters"]),
        (["fashion", "--model.path=/no/such"], ["model.path /no/such does not exist", "give builtin:"]),
        (["dit-xl-2-256-t20"], ["model.path DiT-XL-2-256x256.pt does not exist"]),
        (["fashion", "--storage-path=/proc/x"], ["storage_path /proc/x cannot be written", "writable"]),
        (["fashion", "--storage-path=nope://x"], ["storage_path nope://x is of an unknown kind, nope"]),
        (["fashion", "--storage-path=s3://id:hush@b/p"], ["storage_path is 's3://b/p'", "~/.aws gives it"]),
        (["fashion", "--storage-endpoint=http://a:b@c"], ["storage_endpoint is 'http://c'", "http://host"]),
        (["fashion", "--stages", "prompts"], ["stages is ('prompts',)", "takes labels: leave prompts out"]),
        (["fashion-text", "--stages", "train"], ["no embedded prompts yet", "add the stage prompts"]),
        (["fashion-text", "--prompts.path="], ["prompts.path is ''", "give a file of prompts"]),
        (
            ["fashion-text", "--prompts.max-tokens=8"],
            ["prompts.max_tokens is 8", "takes 16"],
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not any(a.startswith("--storage-path") for a in arguments):
        arguments = [*arguments, f"--storage-path={tmp_path}"]
    assert workflow.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    for word in words:
        assert word in error
    assert not ray.is_initialized(), "refused before any work starts"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stages", "sweep", "--sweep.over=target_cur"],
        ["--stages", "compare", "--train.target-psnr=40", "--train.target-speedup=0"],
        ["--train.target-cur=0.4", "--train.target-speedup=0"],
        ["--train.target-speedup=1.016"],
    ],
)
def test_every_target_of_a_preset_can_be_another(arguments: list[str], tmp_path: Path) -> None:
    given = ["fashion", f"--storage-path={tmp_path}", "--stages", "train", *arguments]
    workflow.Workflow(workflow.parse(given, workflow.PRESETS, "workflow.py")).check()


@pytest.mark.parametrize("override", ["--train.trajectoris=3", "--train.trajectories=many"])
def test_a_bad_override_exits_2(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        workflow.main(["fashion", override])
    assert exit_.value.code == 2
    assert override.split("=")[0] in capsys.readouterr().err


def test_a_truncated_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code = workflow.main(["fashion", f"--model.path={tmp_path / 'model'}", f"--storage-path={tmp_path}"])
    assert code == 2
    assert "cannot be read, it may be truncated: fetch it again" in capsys.readouterr().err


def test_a_taken_port_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert workflow.main(["fashion", f"--storage-path={tmp_path}", f"--serve.port={port}"]) == 2
    error = capsys.readouterr().err
    assert f"serve.port is {port}" in error and "give another port" in error


def test_a_run_is_resumed_with_its_own_settings_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "r1"
    run.mkdir(parents=True)
    started = workflow.PRESETS["fashion"]().to_dict() | {"seed": 7}
    (run / "config.json").write_text(json.dumps(started))
    assert workflow.main(["fashion", "--run-id=r1", f"--storage-path={tmp_path / 'runs'}"]) == 2
    assert "seed was 7 and is 0: resume run_id r1 with its own settings" in capsys.readouterr().err


def test_how_a_run_is_placed_may_change_when_it_is_resumed(tmp_path: Path) -> None:
    def prepared(*arguments: str) -> workflow.Workflow:
        given = ["fashion", "--run-id=r1", f"--storage-path={tmp_path}", "--stages", "train", *arguments]
        made = workflow.Workflow(workflow.parse(given, workflow.PRESETS, "workflow.py"))
        made.check()
        return made

    first = prepared()
    resume.begin(first.config, first.storage)
    prepared("--train.num-workers=1", "--train.placement-strategy=SPREAD", "--train.stall-timeout-s=60")
    with pytest.raises(ValueError, match=r"^train.trajectories was \d+ and is 31: resume run_id r1 with"):
        prepared("--train.trajectories=31")


def test_doing_stages_again_wants_a_run() -> None:
    with pytest.raises(ValueError, match="from is 'train': give the --run-id"):
        workflow.parse(["fashion", "--from=train"], workflow.PRESETS, "workflow.py")


def test_a_router_of_another_step_count_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    make_artifact(model).save(tmp_path / "runs" / "r1" / "router")
    arguments = [
        "fashion",
        "--run-id=r1",
        f"--storage-path={tmp_path / 'runs'}",
        f"--model.path={model.path}",
    ]
    assert workflow.main(arguments) == 2
    steps = "sampler.num_inference_steps is 20 and the router was made for 8"
    assert steps in capsys.readouterr().err


def test_evaluation_without_a_router_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workflow.main(["fashion", f"--storage-path={tmp_path}", "--stages", "evaluate"]) == 2
    assert "has no router yet: add the stage train" in capsys.readouterr().err


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
def test_the_chain_in_awkward_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home sweet home"
    home.mkdir()
    if (token := Path.home() / ".ray" / "auth_token").exists():  # Ray may have read it in this process
        shutil.copytree(token.parent, home / ".ray")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    names = ("a?b=c%20d", "ä #1;2", "100% rel")
    given = (f"~/{names[0]}/", f"file://{quote(str(tmp_path / names[1]))}", f"./{names[2]}/../{names[2]}")
    places = (home / names[0], tmp_path / names[1], tmp_path / names[2])
    write_model(tmp_path / "mo?del #1")
    stages = [["--stages", "train", *more, "register"] for more in (["evaluate"], [], [])]
    left = [
        {"config.json", "report.html", "report.json", "router", "train"},
        *[{"config.json", "router"}] * 2,
    ]
    try:
        for path, place, asked, files in zip(given, places, stages, left):
            arguments = ["fashion", "--run-id=r1", f"--storage-path={path}", LET_THROUGH, *SMALL, *asked]
            arguments += [*ONE_OF_A_KIND, "--model.path=mo?del #1"]
            assert workflow.main(arguments) == 0, capsys.readouterr().err
            run, said = place / "r1", capsys.readouterr().out
            assert f"results:  {run}\n" in said and "version 1 of harmonica-fashion is the champion" in said
            assert files <= set(os.listdir(run))
            assert set(os.listdir(place)) == {"r1", "mlflow.db", "mlartifacts"}
            router = RouterArtifact.load(f"{path.rstrip('/')}/r1/router")
            registered, version = registry.load("harmonica-fashion", registry.CHAMPION, tracking_uri(path))
            assert version == "1" and registered.plan == router.plan
    finally:
        ray.shutdown()
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"home sweet home", "mo?del #1", *names[1:]}, "and nowhere else"
    assert {path.name for path in home.iterdir() if path.name[0] != "."} == {names[0]}


RUNS = """select coalesce(parent.value, ''), stage.value, runs.status from runs
    join tags stage on stage.run_uuid = runs.run_uuid and stage.key = 'harmonica.stage'
    left join tags parent on parent.run_uuid = runs.run_uuid and parent.key = 'mlflow.parentRunId'
    order by runs.start_time"""


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_chain_with_everything_on_s3_and_runs_in_postgresql(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if postgres.binaries() is None:
        pytest.skip("PostgreSQL is not installed: on Debian, apt-get install postgresql")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HARMONICA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    write_model(folder)
    with s3_server() as s3, postgres.Postgres() as database:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_ENDPOINT_URL")  # the workflow's own setting says it, once
        for path in folder.iterdir():
            s3.client().put_object(Bucket=BUCKET, Key=f"models/dit/{path.name}", Body=path.read_bytes())
        arguments = ["fashion", "--run-id=r1", f"--storage-path=s3://{BUCKET}/runs", LET_THROUGH, *SMALL]
        arguments += [f"--storage-endpoint={s3.endpoint}", f"--model.path=s3://{BUCKET}/models/dit"]
        arguments += [f"--serve.port={free_port()}", "--node-metrics-interval-s=1", *ONE_OF_A_KIND]
        server = MlflowServer(
            tmp_path / "server",
            database=database.uri,
            artifacts=f"s3://{BUCKET}/mlflow",
            environment=s3.environment,
        )
        with server:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
            try:
                assert workflow.main(arguments) == 0, capsys.readouterr().err
                said, stored = capsys.readouterr(), s3.stored()
                assert workflow.main([*arguments, "--stages", "train", "evaluate", "register"]) == 0
                assert capsys.readouterr().out.count("done before") == 3
                runs = [line.split("|") for line in database.query("mlflow", RUNS).splitlines()]
                assert [stage for _, stage, _ in runs] == ["workflow", "train", "evaluate"], "none twice"
                (parent,) = {parent for parent, _, _ in runs[1:]}
                assert parent and not runs[0][0], "stages are nested in the workflow"
                assert {status for _, _, status in runs} == {"FINISHED"}
                again = [*arguments, "--from=evaluate", "--stages", "train", "evaluate", "register"]
                assert workflow.main(again) == 0, capsys.readouterr().err
                out = capsys.readouterr().out
                assert out.count("done before") == 1 and "[register] version 2 of" in out
            finally:
                ray.shutdown()
        host = socket.gethostname()
        counts = "select count(*), count(distinct step) from metrics where run_uuid = '{}' and key = '{}'"
        for name in ("cpu_utilization_percentage", "system_memory_usage_megabytes"):
            said_of = database.query("mlflow", counts.format(parent, f"system/{host}/{name}"))
            points, steps = map(int, said_of.split("|"))
            assert points == steps > 5, name
        for name in ("config.json", "report.json", "samples.png", "router.png", "served.png"):
            assert f"runs/r1/{name}" in stored
        assert any(key.startswith("runs/r1/train/checkpoints/") for key in stored)
        for name in ("config.json", "router.safetensors"):
            assert f"runs/r1/router/{name}" in stored
            assert any(
                key.startswith("mlflow/") and key.endswith(f"artifacts/router/{name}") for key in stored
            )
        assert SECRET not in said.out + said.err + (tmp_path / "server" / "mlflow-server.log").read_text()
        assert not (tmp_path / "server" / "mlartifacts").exists(), "artifacts are on S3 alone"


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
