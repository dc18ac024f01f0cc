"""Who may ask, and what is told to nobody: keys and prompts."""

import logging
import os
import subprocess

import openai
import pytest
from fastapi.testclient import TestClient
from live_app import running
from PIL import Image
from tiny_dit import make_artifact, write_model
from tiny_engine import make_engine

from harmonica.models.loading import load_model
from pipelines.config.serve import ServeConfig
from pipelines.serving.auth import ENVIRONMENT, OPEN_PATHS, key_headers, load_keys
from pipelines.serving.client import curl_command, first_image
from pipelines.serving.deployments import api_builder
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.images_api import create_app
from pipelines.serving.requests import EngineRequest

PATH = "/v1/images/generations"
KEYS = ("first-key", "zweiter-schlüssel")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    return make_engine(load_model(model), make_artifact(model))


@pytest.fixture(scope="module")
def client(source):
    with TestClient(create_app(source, KEYS), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_opens(client, key):
    for kind in ("Bearer", "bearer"):
        headers = {"authorization": f"{kind} {key}".encode()}
        assert client.post(PATH, json={"prompt": "Bag"}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        *(
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer first-ke",
            "Bearer first-key2",
            "Basic first-key",
            "first-key",
        ),
        *("Bearer First-Key", "Bearer\tfirst-key", "Bearer first-key, Bearer first-key", "Token first-key"),
    ],
)
def test_nothing_else_does(client, header):
    headers = {} if header is None else {"authorization": header}
    in_query = {"key": "first-key", "api_key": "first-key", "authorization": "Bearer first-key"}
    for answer in (
        client.post(PATH, json={"prompt": "Bag"}, headers=headers),
        client.post(PATH, json={"prompt": "Bag", "stream": True}, headers=headers),
        client.post(PATH, json={"prompt": "Bag"}, headers=headers, params=in_query),
        client.post(f"{PATH}/", json={"prompt": "Bag"}, headers=headers),
        client.get("/v1/models", headers=headers),
        client.head("/v1/models", headers=headers),
        client.get("/v1/routers", headers=headers),
        client.get("/nowhere", headers=headers),
        client.get("http://testserver//healthz", headers=headers),
        client.get("/healthz/x", headers=headers),
    ):
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        if answer.request.method == "HEAD":
            continue
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert "first" not in answer.text and "send Authorization: Bearer KEY" in error["message"]


def test_what_is_wrong_with_the_header_is_said(client):
    for headers, said in (
        ([], "there is no Authorization header"),
        (
            [("authorization", f"Bearer {key}") for key in ("first-key", "other")],
            "more than one Authorization",
        ),
        ([("authorization", "first-key")], "of another scheme than Bearer"),
        ([("authorization", "Bearer wrong")], "no such API key"),
    ):
        assert said in client.get("/v1/models", headers=headers).json()["error"]["message"]


def test_a_stream_is_shown_to_who_has_a_key(client):
    headers = {"AUTHORIZATION": f"BEARER  {KEYS[0]} "}
    answer = client.post(PATH, json={"prompt": "Bag", "stream": True}, headers=headers)
    assert answer.status_code == 200 and "event: image_generation.completed" in answer.text


def test_a_body_is_not_read_for_strangers(client):
    assert client.post(PATH, content=b"x" * 100_000).status_code == 401


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_what_no_key_protects_is_open(client, path):
    for answer in (client.get(path), client.head(path), client.get(f"{path}/")):
        assert answer.status_code == 200


def test_the_official_client_brings_its_key(client):
    for key, ok in ((KEYS[0], True), ("wrong", False)):
        api = openai.OpenAI(api_key=key, base_url="http://testserver/v1", http_client=client, max_retries=0)
        if ok:
            assert api.models.list().data[0].id == "tiny"
        else:
            with pytest.raises(openai.AuthenticationError):
                api.models.list()


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load_keys("") == ()
    monkeypatch.setenv(ENVIRONMENT, " one, two ,,")
    assert load_keys("") == ("one", "two")
    assert key_headers("") == {b"authorization": b"Bearer one"}
    monkeypatch.setenv(ENVIRONMENT, "")
    assert load_keys("") == () and key_headers("") == {}
    for nothing in (" ", ",", " , "):
        monkeypatch.setenv(ENVIRONMENT, nothing)
        with pytest.raises(ValueError, match=f"{ENVIRONMENT} is set and holds no key"):
            load_keys("")
    file = tmp_path / "keys"
    file.write_text("three\n\n four \n")
    assert load_keys(str(file)) == ("three", "four"), "the file goes before the environment"
    file.write_bytes("\ufefffünf\r\nsechs\r\n".encode())
    assert load_keys(str(file)) == ("fünf", "sechs")
    file.write_text("\n \n")
    with pytest.raises(ValueError, match=r"serve.api_keys_file is .*, which holds no key: give a file"):
        load_keys(str(file))
    with pytest.raises(ValueError, match=r"serve.api_keys_file is .*, which cannot be read"):
        load_keys(str(tmp_path / "missing"))


@pytest.mark.parametrize("remark", ["# keys of the shop", "#old-key", "key of the shop"])
def test_a_remark_is_no_key(tmp_path, monkeypatch, remark):
    file = tmp_path / "keys"
    file.write_text(f"one\n\n{remark}\n")
    words = "has as number 2 of its keys one that begins with # or has a space inside"
    with pytest.raises(ValueError, match=rf"serve.api_keys_file is .*, which {words}") as refused:
        load_keys(str(file))
    monkeypatch.setenv(ENVIRONMENT, f"one,{remark}")
    with pytest.raises(ValueError, match=f"{ENVIRONMENT} {words}"):
        load_keys("")
    assert remark not in str(refused.value)


def test_this_program_s_own_requests_bring_a_key_and_show_none(source, tmp_path, monkeypatch):
    """The image of the workflow's stage, and the command that is shown to the user."""
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS), encoding="utf-8")
    with running(create_app(source, KEYS)) as url:
        url = url.rstrip("/")
        assert first_image(url, "Bag", seed=3, api_keys_file=str(file))["seed"] == 3
        monkeypatch.setenv(ENVIRONMENT, "wrong")
        with pytest.raises(RuntimeError, match="no such API key"):
            first_image(url, "Bag", seed=3)
        monkeypatch.setenv(ENVIRONMENT, ",".join(KEYS))
        curl = curl_command(url, key_headers(""))
        assert '-H "Authorization: Bearer $HARMONICA_API_KEY"' in curl and KEYS[0] not in curl
        environment = os.environ | {"HARMONICA_API_KEY": KEYS[1]}
        subprocess.run(curl, shell=True, check=True, cwd=tmp_path, env=environment, timeout=60)
    assert Image.open(tmp_path / "image.png").size == (28, 28)
    with running(create_app(source)) as url:
        assert "Authorization" not in curl_command(url.rstrip("/"), {})


def test_an_endpoint_that_was_to_be_closed_does_not_open_where_its_keys_are_missing(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "one")
    build_api = api_builder(ServeConfig())
    monkeypatch.delenv(ENVIRONMENT)
    with pytest.raises(ValueError, match=f"{ENVIRONMENT} is set where the application was built and not"):
        build_api()


def test_prompts_and_keys_are_not_logged(client, caplog):
    caplog.set_level(logging.DEBUG)
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    for prompt in ("Ankle boot", "a private wish"):
        client.post(PATH, json={"prompt": prompt, "seed": 3}, headers=headers)
        client.post(PATH, json={"prompt": prompt}, headers={"authorization": "Bearer mistyped-key"})
    for said in ("private", "Ankle", "key"):
        assert said not in "".join(record.getMessage() for record in caplog.records)
    request = EngineRequest(ImageRequest("a private wish", 1, 0, "an unwanted thing"))
    assert "private" not in repr(request) and "unwanted" not in repr(request)


def test_other_sites_pages_may_not_ask(client):
    headers = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    for answer in (client.options(PATH, headers=headers), client.get("/healthz", headers=headers)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_sites_that_are_named_may_ask_and_others_still_not(source):
    mine = "https://gallery.example"
    with TestClient(create_app(source, KEYS, cors_origins=[mine])) as client:
        for origin, may in ((mine, True), ("https://elsewhere.example", False)):
            headers = {"origin": origin, "access-control-request-method": "POST"}
            headers["access-control-request-headers"] = "authorization"
            before = client.options(PATH, headers=headers)
            assert (before.headers.get("access-control-allow-origin") == origin) == may
            headers = {"origin": origin, "authorization": f"Bearer {KEYS[0]}"}
            answer = client.post(PATH, json={"prompt": "Bag"}, headers=headers)
            assert (answer.headers.get("access-control-allow-origin") == origin) == may
        refused = client.post(PATH, json={"prompt": "Bag"}, headers={"origin": mine})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == mine, "or no page could read why"
