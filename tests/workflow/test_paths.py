"""What a path stands for, whoever is given it: one answer, whatever characters it has."""

import getpass
import os
import re
from pathlib import Path
from urllib.parse import quote

import pytest
from s3_server import BUCKET, s3_server
from tiny_dit import make_artifact, write_model

from harmonica.cli.training_folder import TrainingFolder
from harmonica.core.artifact import RouterArtifact
from harmonica.io.file_systems import open_uri
from harmonica.io.paths import is_remote, local, resolved, scrubbed, shown
from harmonica.io.resolve import local_path
from pipelines.data.embed_prompts import store_folder
from pipelines.run_state.storage import RunStorage
from pipelines.tracking.mlflow_runs import find_or_create, find_run
from pipelines.tracking.mlflow_store import artifacts_of, database_of, tracking_uri
from pipelines.ui import UiCommand, server_environment

AWKWARD = ["a b", "äöü", "a#b", "a;b", "a%20b", "100%", "a?b=c", "a&b", "a'b\"c", "-a", "~", "a:b", "日本"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("name", AWKWARD)
def test_a_local_path_keeps_its_characters(name, home, tmp_path):
    place = tmp_path / name
    assert resolved(place, "it") == str(place)
    assert resolved(f"{place}/", "it") == resolved(f"{place}//.", "it") == str(place)
    assert resolved(f"./{name}/../{name}", "it") == str(place)
    assert resolved(f"~/{name}", "it") == str(home / name)
    assert resolved(f"file://{quote(str(place))}", "it") == str(place)
    assert resolved(f"FILE://localhost{quote(str(place))}/", "it") == str(place)
    assert resolved(Path(f"file://{quote(str(place))}"), "it") == str(place), "which has lost a slash"


def test_home_folders_and_links(home, tmp_path):
    assert resolved("~", "it") == str(home)
    user = getpass.getuser()
    assert resolved(f"~{user}/x", "it") == str(Path(os.path.expanduser(f"~{user}")) / "x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert resolved("link/x", "it") == str(tmp_path / "link" / "x"), "by the name that was given"
    (tmp_path / "far").symlink_to("/")
    assert resolved("far/../x", "it") == "/x", "as the system sees it"
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ValueError, match=r"it round/x/\.\. leads nowhere"):
        resolved("round/x/..", "it")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("s3://b/p/", "s3://b/p"),
        ("S3://b", "s3://b"),
        ("gs://b//p//", "gs://b//p"),
        ("s3://b/a b", "s3://b/a%20b"),
        ("s3://b/a%20b", "s3://b/a%20b"),
        ("s3://b/ä#;100%", "s3://b/%C3%A4%23;100%25"),
        ("s3://b/p/?region=r&scheme=http", "s3://b/p?region=r&scheme=http"),
    ],
)
def test_a_store_s_uri_is_made_one(given, found):
    assert resolved(given, "it") == found == resolved(found, "it")
    assert is_remote(found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "it is '': give a local path"),
        ("nope://x/y", "it nope://x/y is of an unknown kind, nope: give a local path, a file:// URI"),
        ("https://h/x", "of an unknown kind, https"),
        ("nope://id:hush@x/y", "it nope://x/y is of an unknown kind"),
        ("s3://", "it s3:// names no bucket: give s3://bucket/prefix"),
        ("s3:/b/p", "it s3:/b/p names no bucket: give s3://bucket/prefix"),
        ("file://host/x", "is a file of the host 'host': give file:///absolute/path"),
        ("file:///a?b", "write %3F or %23, or give the path without file://"),
        ("file:///a#b", "which end the path of a URI"),
        ("~no-such-user/x", "of a user without a home folder: give an absolute path"),
    ],
)
def test_what_names_no_place_is_refused_in_one_line(given, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        resolved(given, "it")
    assert "hush" not in str(caught.value) and "\n" not in str(caught.value)


def test_where_only_this_machine_will_do():
    with pytest.raises(ValueError, match="router s3://b/p is in an object store: give a local path"):
        local("s3://id:hush@b/p", "router")
    assert shown("/a?b://c") == "/a?b://c"


@pytest.mark.parametrize("form", ["{uri}", "{user} may not", "{user} and {secret}", "query {query}"])
def test_a_library_s_words_lose_what_may_be_a_secret(form):
    uri = "s3://name:hush%2Fhush@b/p?region=r&token=silence"
    words = form.format(uri=uri, user="name:hush/hush", secret="hush/hush", query="token=silence")
    assert not re.search("name|hush|silence", scrubbed(f"Cannot read {words}", uri))


def test_a_uri_that_cannot_be_opened_says_why_without_credentials():
    with pytest.raises(
        ValueError, match=r"it s3://b/p cannot be opened \(ArrowInvalid: .*'bogus'\)"
    ) as caught:
        open_uri("s3://name:hush@b/p?bogus=silence", "it")
    assert caught.value.__suppress_context__ and not re.search("name|hush|silence", str(caught.value))


@pytest.mark.parametrize("name", AWKWARD)
def test_all_who_take_a_path_mean_the_same_place(name, home, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for given in (f"./{name}", f"file://{quote(str(tmp_path / name))}", f"{tmp_path / name}/"):
        storage = RunStorage(given, "r1")
        storage.write_bytes("folder/a", b"x")
        assert (tmp_path / name / "r1" / "folder" / "a").read_bytes() == b"x"
        assert storage.uri("folder") == str(tmp_path / name / "r1" / "folder")
        again = RunStorage(storage.root, "r1")
        assert again.names("folder") == ["a"]
        assert database_of(given) == tmp_path / name / "mlflow.db"
        assert artifacts_of(given) == tmp_path / name / "mlartifacts"
        assert tracking_uri(given) == tracking_uri(str(tmp_path / name))
        filesystem, path = open_uri(f"{given.rstrip('/')}/r1/folder/a", "prompts.path")
        with filesystem.open_input_stream(path) as stream:
            assert stream.read() == b"x"
        assert store_folder(f"{given.rstrip('/')}/r1").path("folder") == path.removesuffix("/a")
        assert local_path(f"{given.rstrip('/')}/r1") == tmp_path / name / "r1"
        database_of(given).touch()
        assert tracking_uri(given) in server_environment(UiCommand(storage_path=given)).values()
        if given != "./~":  # which is ~ once it is a `Path`
            assert TrainingFolder(Path(given), {}).path == tmp_path / name
    assert {path.name for path in tmp_path.iterdir()} == {name}, "and nowhere else"


def test_routers_in_awkward_folders(home, tmp_path):
    model = write_model(tmp_path / "mo?del")
    artifact = make_artifact(model)
    for given, place in (("~/a?b#c %20;ä", home), (f"file://{quote(str(tmp_path / 'a?b'))}", tmp_path)):
        assert place in artifact.save(given).parents
        assert RouterArtifact.load(given).plan == artifact.plan
    assert not (tmp_path / "~").exists() and not (tmp_path / "file:").exists()


@pytest.mark.parametrize("name", ["a?b=c%20d#e;f ä"])
def test_mlflow_keeps_its_file_in_an_awkward_folder(name, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, picture = tmp_path / name, tmp_path / "picture.png"
    made = find_or_create("workflow", "r1", str(folder), {"a": 1})
    picture.write_bytes(b"x")
    made.client.log_artifact(made.mlflow_run_id, str(picture))
    assert find_run("workflow", "r1", f"{folder}/") == made
    assert (folder / "mlflow.db").stat().st_size
    assert list((folder / "mlartifacts").rglob("picture.png"))
    assert {path.name for path in tmp_path.iterdir()} == {name, "picture.png"}, "and nothing beside it"


def test_awkward_prefixes_in_a_bucket(monkeypatch):
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        for number, name in enumerate(("a b", "ä;#", "a%20b", "100%")):
            RunStorage(f"s3://{BUCKET}/{number}/{name}/", "r1").write_bytes("x", b"x")
        stored = server.stored()
    assert stored == ["0/a b/r1/x", "1/ä;#/r1/x", "2/a b/r1/x", "3/100%/r1/x"]
