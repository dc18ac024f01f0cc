"""The command behind `make ui`: what it starts, and what it says when there is nothing to show."""

import pytest

from pipelines.ui import UiCommand, server_command, server_environment


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_it_shows_the_store_that_the_workflow_writes(tmp_path):
    (tmp_path / "mlflow.db").touch()
    asked = UiCommand(storage_path=str(tmp_path), port=5055)
    command = server_command(asked)
    options = dict(zip(command[4::2], command[5::2]))
    assert server_environment(asked) == {"MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    assert options["--artifacts-destination"] == f"{tmp_path}/mlartifacts"
    assert (options["--host"], options["--port"]) == ("127.0.0.1", "5055")
    assert options["--uvicorn-opts"] == "--log-level warning", "no line for every request"


def test_an_empty_storage_path_is_named_and_not_made(tmp_path):
    with pytest.raises(ValueError, match=r"storage_path is .*none': there are no runs in it yet"):
        server_command(UiCommand(storage_path=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_a_database_s_password_is_on_no_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://id:hush@db/mlflow")
    asked = UiCommand(storage_path=str(tmp_path))
    assert "hush" not in " ".join(server_command(asked))
    assert server_environment(asked) == {"MLFLOW_BACKEND_STORE_URI": "postgresql://id:hush@db/mlflow"}


def test_a_running_server_is_pointed_at(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://id:hush@mlflow:5000")
    with pytest.raises(ValueError, match="is http://mlflow:5000: open that in a browser"):
        server_command(UiCommand())
