"""The chain of stages for real in awkward folders, and on S3 with runs in PostgreSQL."""

import os
import shutil
import socket
from pathlib import Path
from urllib.parse import quote

import postgres
import pytest
import ray
from mlflow_server import MlflowServer
from processes import free_port
from s3_server import BUCKET, SECRET, s3_server
from tiny_dit import write_model

from harmonica.core.artifact import RouterArtifact
from pipelines import workflow
from pipelines.tracking import registry
from pipelines.tracking.mlflow_store import tracking_uri
from tests.workflow.test_workflow import LET_THROUGH, ONE_OF_A_KIND, SMALL


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
