"""The folder of a run, on a disk and on a real S3 endpoint: one behaviour."""

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from s3_server import BUCKET, SECRET, s3_server

from harmonica.io.file_systems import open_uri
from pipelines.run_state.storage import RunStorage, settle_endpoint

OUTAGE_S = 10  # pyarrow by itself outlasts 6


@pytest.fixture
def s3(monkeypatch):
    with s3_server() as server:
        for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(params=["disk", "s3"])
def storage(request, tmp_path):
    if request.param == "disk":
        return RunStorage(str(tmp_path / "runs"), "r1")
    request.getfixturevalue("s3")
    return RunStorage(f"s3://{BUCKET}/runs", "r1")


def test_what_is_written_is_read(storage):
    storage.check_writable()
    assert storage.names("train") == []
    assert not storage.exists("train/a")
    storage.write_bytes("train/b", b"old")
    storage.write_bytes("train/b", b"new")
    storage.write_json("train/a", {"x": 1})
    assert (storage.read_bytes("train/b"), storage.read_json("train/a")) == (b"new", {"x": 1})
    assert storage.names("train") == ["a", "b"]
    assert storage.exists("train/a") and storage.exists("train")
    storage.delete("train/a")
    storage.delete("train/a")  # gone already: fine
    assert storage.names("train") == ["b"]
    storage.write_bytes("b", b"x")
    for name in ("train", "train", "b", "b"):
        storage.delete_all(name)
    assert not storage.exists("train/b") and not storage.exists("b") and storage.names("train") == []


def test_a_folder_is_listed_while_it_is_made(tmp_path):
    """pyarrow looks twice where there is none, and fails if it is there the second time."""
    storage, ended = RunStorage(str(tmp_path), "r1"), threading.Event()
    (tmp_path / "r1").mkdir()

    def come_and_go() -> int:
        turns = 0
        while not ended.is_set():
            (tmp_path / "r1" / "train").mkdir()
            (tmp_path / "r1" / "train").rmdir()
            turns += 1
        return turns

    with ThreadPoolExecutor(1) as pool:
        turns = pool.submit(come_and_go)
        until = time.monotonic() + 2
        try:
            while time.monotonic() < until:
                assert storage.names("train") == []
        finally:
            ended.set()
    assert turns.result() > 1


def test_of_a_folder_the_manifest_comes_last(storage, tmp_path, monkeypatch):
    folder = tmp_path / "router"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "a.safetensors", "sub/z.txt"):
        (folder / name).write_text(name)
    written = []
    write = storage.write_bytes
    monkeypatch.setattr(storage, "write_bytes", lambda name, data: (written.append(name), write(name, data)))
    storage.upload_folder(folder, "router")
    assert written[-1] == "router/config.json" and len(written) == 3


def test_a_folder_to_read_is_gone_once_it_is_read(storage, tmp_path, monkeypatch):
    local = tmp_path / "temporary"
    local.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    for name in ("config.json", "sub/z.txt"):
        storage.write_bytes(f"router/{name}", name.encode())
    with storage.local_folder("router") as folder:
        assert (folder / "sub" / "z.txt").read_text() == "sub/z.txt"
        assert list(local.iterdir()) == ([] if storage.is_local else [folder])
    with pytest.raises(KeyError), storage.local_folder("router"):
        raise KeyError
    assert list(local.iterdir()) == []
    assert storage.read_bytes("router/config.json") == b"config.json", "the run's own stays"


def test_a_folder_takes_the_place_of_another_whole(storage, tmp_path):
    made = tmp_path / "made"
    for names in (("config.json", "old.txt", "sub/old.txt"), ("config.json", "new.txt")):
        shutil.rmtree(made, ignore_errors=True)
        for name in names:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_text(names[1])
        storage.replace_folder(made, "router")
    with storage.local_folder("router") as copy:
        found = {p.relative_to(copy).as_posix(): p.read_text() for p in copy.rglob("*") if p.is_file()}
    assert found == {"config.json": "new.txt", "new.txt": "new.txt"}
    shutil.rmtree(made)
    made.mkdir()
    storage.replace_folder(made, "router")
    storage.replace_folder(made, "router")
    assert not storage.exists("router/config.json") and not storage.exists("router/new.txt")


def test_what_a_kill_left_of_a_folder_goes_with_the_next(tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    storage, made = RunStorage(str(tmp_path / "runs"), "r1"), tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("old")
    storage.replace_folder(made, "router")
    (made / "config.json").write_text("new")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(KeyboardInterrupt):
            storage.replace_folder(made, "router")
    assert storage.read_bytes("router/config.json") == b"old"
    storage.replace_folder(made, "router")
    assert storage.read_bytes("router/config.json") == b"new"
    assert [path.name for path in (tmp_path / "runs" / "r1").iterdir()] == ["router"]


def test_a_probe_leaves_nothing_behind(storage, tmp_path):
    storage.check_writable()
    assert not (tmp_path / "runs").exists() and not storage.exists(".write-probe")
    storage.write_bytes("a", b"x")
    storage.check_writable()
    assert storage.read_bytes("a") == b"x"


def test_a_uri_opens_what_the_storage_wrote(storage):
    storage.write_bytes("train/a", b"x")
    filesystem, path = open_uri(storage.uri("train/a"), "it")
    with filesystem.open_input_stream(path) as stream:
        assert stream.read() == b"x"


def test_one_endpoint_serves_pyarrow_and_boto3(s3):
    RunStorage(f"s3://{BUCKET}/runs", "r1").write_bytes("a", b"by pyarrow")
    assert boto3.client("s3").get_object(Bucket=BUCKET, Key="runs/r1/a")["Body"].read() == b"by pyarrow"


def test_an_endpoint_in_a_profile_is_told_to_those_that_do_not_read_it(s3, tmp_path, monkeypatch):
    (tmp_path / "config").write_text(f"[default]\nendpoint_url = {s3.endpoint}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    settle_endpoint()
    assert os.environ["AWS_ENDPOINT_URL"] == s3.endpoint
    storage = RunStorage(f"s3://{BUCKET}/runs", "r1")
    storage.write_bytes("a", b"x")
    assert s3.stored("runs/") == ["runs/r1/a"]
    settle_endpoint("http://127.0.0.1:1")
    assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"


def test_amazon_itself_is_left_alone(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/no/such")
    settle_endpoint()
    assert "AWS_ENDPOINT_URL" not in os.environ


def test_a_store_that_does_not_answer_for_a_while_is_waited_for(s3):
    patient = RunStorage(f"s3://{BUCKET}/runs", "r1", patient=True)
    brief = RunStorage(f"s3://{BUCKET}/runs", "r1")
    s3.stop()
    with pytest.raises(
        ValueError, match=r"storage_path s3://bucket/runs cannot be written \(.*: give a writ"
    ):
        brief.check_writable()
    threading.Timer(OUTAGE_S, s3.start).start()
    started = time.monotonic()
    patient.write_bytes("a", b"x")
    assert time.monotonic() - started > OUTAGE_S - 0.5
    assert brief.read_bytes("a") == b"x"


def test_a_missing_bucket_is_named_without_credentials(s3):
    with pytest.raises(ValueError, match="storage_path s3://no-such-bucket/runs cannot be written") as caught:
        RunStorage("s3://no-such-bucket/runs", "r1").check_writable()
    assert SECRET not in str(caught.value)


def test_no_name_in_a_store_leads_out_of_the_copy_of_its_folder(s3):
    storage, evil = RunStorage(f"s3://{BUCKET}/runs", "r1"), f"harmonica-test-{os.getpid()}"
    storage.write_bytes("router/sub/config.json", b"{}")
    with storage.local_folder("router") as folder:
        assert [path.relative_to(folder).as_posix() for path in folder.rglob("*.json")] == ["sub/config.json"]
        outside = folder.parent / evil
    # A store resolves the second name as it is asked for, and so finds the first.
    for key in (f"runs/r1/{evil}", f"runs/r1/router/../{evil}"):
        s3.client().put_object(Bucket=BUCKET, Key=key, Body=b"x")
    try:
        words = r"r1/router holds .*/router/\.\./.*, which leads out of it"
        with pytest.raises(ValueError, match=words), storage.local_folder("router"):
            pass
        assert not outside.exists()
    finally:
        outside.unlink(missing_ok=True)


FILL = """
import sys
from pipelines.run_state.storage import RunStorage
storage = RunStorage(sys.argv[1], "r1")
storage.write_bytes("a", b"x" * 1000)
storage.write_bytes("a", b"y" * 100_000)
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    limit = 50_000
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert "r1/a of 100,000 bytes finds no room (File too large)" in done.stderr
    assert "make room and run again with the same run id" in done.stderr
    storage = RunStorage(str(tmp_path), "r1")
    assert storage.read_bytes("a") == b"x" * 1000
    assert [path.name for path in (tmp_path / "r1").iterdir()] == ["a"], "no remains"
