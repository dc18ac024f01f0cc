"""Clusters and MLflow stores that cannot do are refused within seconds, before Ray starts, in one line."""

import base64
import http.server
import re
import sqlite3
import threading
import time
import traceback
from pathlib import Path

import pytest
import ray
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from processes import free_port

from pipelines import workflow
from pipelines.runtime.cluster_address import check_address, cluster_address
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create, make_client
from pipelines.tracking.mlflow_store import check_store, sqlite_uri, tracking_uri, without_credentials

MODEL = "router"


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """What `workflow.py` says under a value of a variable."""

    def run(variable: str, value: str) -> str:
        monkeypatch.setenv(variable, value)
        capsys.readouterr()
        started = time.monotonic()
        arguments = ["fashion", "--run-id=r1", f"--storage-path={tmp_path / 'runs'}", "--stages", "train"]
        assert workflow.main(arguments) == 2
        assert time.monotonic() - started < 40, "seconds, but for the model and a busy machine"
        assert not ray.is_initialized() and not (tmp_path / "runs").exists()
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {variable} is ") and "\n" not in error
        return error

    return run


@pytest.fixture
def web_server():
    """host:port of something that speaks HTTP, as a cluster's dashboard does."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://head:8265", "use `ray job submit --address http://head:8265 --working-dir . --"),
        ("ray://head:10001", "which Ray Train does not support: submit the workflow with `ray job submit`"),
        ("head", "which is no address: give host:port"),
        ("head:port", "which is no address"),
        ("head:66000", "which is no address"),
        (
            "127.0.0.1:1",
            r"where nothing answers \(Connection refused\): start the cluster, or give host:port",
        ),
        ("[::1]:1", "where nothing answers"),
        ("no-such-host.invalid:6379", "where nothing answers"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_refused(address, words, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=rf"RAY_ADDRESS is {re.escape(address)}, .*{words}"):
        check_address()


def test_what_answers_and_is_no_cluster_is_refused(web_server, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", web_server)
    started = time.monotonic()
    with pytest.raises(ValueError, match=rf"is {web_server}, where something answers that is no Ray head"):
        check_address()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("address", ["", "local"])
def test_a_private_cluster_wants_no_address(address, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    check_address()
    assert cluster_address() == ""


def test_the_workflow_says_so_and_ends_with_2(refused):
    assert "where nothing answers" in refused("RAY_ADDRESS", f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("file:///a/mlruns", "a folder of files, .*: give sqlite:////absolute/path/mlflow.db or a server"),
        ("./mlruns", "a folder of files"),
        ("mlruns", "a folder of files"),
        ("sqlite://", "a database in memory, .*: give sqlite:////absolute/path/mlflow.db"),
        ("sqlite:///:memory:", "a database in memory"),
        ("sqlite:///file:mlflow.db?uri=true", "relative to wherever a process runs: give an absolute path"),
        ("databricks", "a Databricks workspace, .* a path and not 'harmonica': give the http address of an"),
        ("databricks://profile", "a Databricks workspace"),
        ("nope://somewhere", "cannot be used"),
        ("http://127.0.0.1:1", "where nothing answers .*: start the server, or correct the address"),
        ("postgresql://id:hush@127.0.0.1:1/mlflow", "where nothing answers"),
        ("http://no-such-host.invalid", "where nothing answers"),
    ],
)
def test_a_store_that_cannot_do_is_refused(uri, words, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"MLFLOW_TRACKING_URI is .*{words}") as caught:
        check_store("runs")
    assert "\n" not in str(caught.value) and "hush" not in str(caught.value)
    assert time.monotonic() - started < 20, "MLflow by itself tries for minutes"


def test_a_file_that_cannot_be_written_is_refused_and_none_is_made(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "plain").touch()
    monkeypatch.setattr(MlflowClient, "__init__", lambda *_, **__: pytest.fail("it tries for a minute"))
    for file in ("/proc/x.db", "/proc/deeper/x.db", folder / "plain" / "x.db", folder):
        for uri in (f"sqlite:///{file}", f"sqlite:///file:{file}?uri=true"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
            words = (
                f"^MLflow's store is {file}, which cannot be written .*: make it and its folder writable, or"
            )
            with pytest.raises(ValueError, match=words):
                check_store("runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/deeper/still/x.db")
    check_store("runs")
    assert [path.name for path in folder.iterdir()] == ["plain"]


def test_the_workflow_refuses_it_before_ray_starts(refused):
    assert "a folder of files" in refused("MLFLOW_TRACKING_URI", "./mlruns")


def test_any_server_that_answers_will_do_for_a_start(web_server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{web_server}")
    with pytest.raises(ValueError, match="which cannot be used"):  # it is none of MLflow's
        check_store("runs")


@pytest.fixture
def broken_server(monkeypatch):
    """An MLflow server that fails, and the Authorization headers that it was sent."""
    sent = []

    class Fails(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            sent.append(self.headers["Authorization"])
            self.send_error(500)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "of another server")  # and gone after the test
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fails)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}", sent
    server.shutdown()
    server.server_close()


def test_mlflow_s_errors_have_no_password_and_its_server_gets_it(broken_server):
    address, sent = broken_server
    uri = f"http://id:hush%2Fhush@{address}"
    calls = (
        lambda: registry.resolve(MODEL, "champion", uri),
        lambda: registry.load_version(MODEL, "1", uri),
        lambda: registry.newest_versions(MODEL, uri, 1),
    )
    for call in calls:
        with pytest.raises(MlflowException) as failed:
            call()
        said = "".join(traceback.format_exception(failed.value))
        assert address in said and "hush" not in said
    assert set(sent) == {f"Basic {base64.b64encode(b'id:hush/hush').decode()}"}


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://id:hu/sh@db/mlflow", "postgresql://db/mlflow"),
        ("postgresql://id:hu@sh@db/mlflow", "postgresql://db/mlflow"),
        ("postgresql://db/mlflow?user=id&password=hush", "postgresql://db/mlflow"),
        ("no http://id:hush@host/x?y=1 (url: /x?y=1)", "no http://host/x (url: /x?y=1)"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_addresses_are_shown_without_what_may_be_a_password(uri, shown):
    assert without_credentials(uri) == shown


@pytest.mark.parametrize("uri", ["sqlite:///sub/mlflow.db", "sqlite:///./sub/../sub/mlflow.db"])
def test_a_relative_database_is_one_in_every_process(uri, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    assert tracking_uri("runs") == f"sqlite:///{tmp_path}/sub/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/mlflow.db")
    assert tracking_uri("runs") == f"sqlite:///{Path.home().resolve()}/mlflow.db"


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////a/mlflow.db",
        "sqlite+pysqlite:////a%3Fb/mlflow.db",
        "sqlite:////a/m.db?timeout=60",
        "http://h",
    ],
)
def test_what_is_absolute_stays_as_it_is(uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri("s3://b/p") == uri


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A storage path whose MLflow has a run and a registered version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("runs")
        run = find_or_create("workflow", "r1", str(folder), {})
        run.client.create_registered_model(MODEL)
        run.client.create_model_version(MODEL, source=str(folder), run_id=run.mlflow_run_id)
        yield folder


def test_a_champion_that_is_deleted_is_none(store, monkeypatch):
    from pipelines.tracking import registry

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = sqlite_uri(store / "mlflow.db")
    client = make_client(uri)
    registry.promote(client, MODEL, "1")
    assert registry.current(MODEL, registry.CHAMPION, uri) is not None
    client.delete_model_version(MODEL, "1")
    assert registry.current(MODEL, registry.CHAMPION, uri) is None
    with sqlite3.connect(store / "mlflow.db") as database:  # as deleting it another way leaves it
        columns = "(name, alias, version, workspace)"
        values = (MODEL, registry.CHAMPION, 1, "default")
        database.execute(f"insert into registered_model_aliases {columns} values (?, ?, ?, ?)", values)
    assert registry.current(MODEL, registry.CHAMPION, uri) is None
    with pytest.raises(ValueError, match=r"alias is 'champion': .* is on version 1, which is deleted"):
        registry.resolve(MODEL, registry.CHAMPION, uri)
    created = client.create_model_version(MODEL, source=str(store), run_id=None)
    registry.promote(client, MODEL, str(created.version))
    assert registry.resolve(MODEL, registry.CHAMPION, uri) == str(created.version)


def test_a_deleted_experiment_is_refused_with_the_way_back(store, monkeypatch, capsys):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    check_store(str(store))
    client = make_client(sqlite_uri(store / "mlflow.db"))
    number = client.get_experiment_by_name("harmonica").experiment_id
    client.delete_experiment(number)
    words = rf"MLflow's store is {store}/mlflow.db, in which the experiment 'harmonica' is deleted: .*"
    with pytest.raises(ValueError, match=rf"{words}restore --experiment-id {number}`"):
        check_store(str(store))
    client.restore_experiment(number)
    check_store(str(store))
