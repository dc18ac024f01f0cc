"""Below the requests for images: paths and methods, bodies that do not come, requests' names."""

import asyncio
import json
import time

import pytest
from fastapi.testclient import TestClient
from images_endpoint import PATH, refused

from pipelines.serving.images_api import create_app


def test_unknown_paths_and_methods(client):
    assert "/v1/chat" in refused(client.get("/v1/chat"), 404, None, "unknown_url")
    answer = client.get(PATH)
    refused(answer, 405, None, "method_not_allowed")
    assert answer.headers["allow"] == "POST"
    assert client.delete("/v1/models").headers["allow"] == "GET, HEAD"


OPEN = [
    "/",
    "/health",
    "/healthz",
    "/livez",
    "/readyz",
    "/v1/models",
    "/v1/routers",
    "/docs",
    "/openapi.json",
]


@pytest.mark.parametrize("path", [*OPEN, "/v1/models/tiny"])
def test_head_is_answered_as_get_is_without_the_body(client, path):
    got, head = client.get(path), client.head(path)
    assert (got.status_code, head.status_code, head.content) == (200, 200, b"")
    assert len(got.content) == int(head.headers["content-length"])
    assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head("/v1/chat").status_code == 404 and client.head(PATH).status_code == 405


@pytest.mark.parametrize("path", [*OPEN[1:], "/v1/models/tiny", "/docs/"])
def test_a_slash_at_the_end_changes_nothing_and_nobody_is_sent_elsewhere(client, path):
    headers = {"host": "elsewhere.example"}
    answer = client.get(f"{path}/", headers=headers, follow_redirects=False)
    assert answer.status_code == 200 and "location" not in answer.headers
    if path != "/healthz":
        assert answer.text == client.get(path).text
    posted = client.post(f"{PATH}/", json={"prompt": "Bag"}, headers=headers, follow_redirects=False)
    assert posted.status_code == 200
    refused(client.get("/nowhere/", headers=headers, follow_redirects=False), 404, None, "unknown_url")


def test_below_another_path_all_is_the_same(source):
    """As behind a proxy that leaves its own path in, or a route prefix of Serve's."""
    with TestClient(create_app(source, keys=("secret",)), root_path="/images") as client:
        for path in ("/images", "/images/", "/images/healthz", "/images/healthz/", "/images/docs"):
            assert client.get(path, follow_redirects=False).status_code == 200, path
        assert client.get("/images/v1/models").status_code == 401


def ask_slowly(app, chunks, pause_s):
    """The messages of an answer to a body that comes in chunks, each after a pause, and then no more."""
    answered = []
    waiting = list(chunks)

    async def receive():
        await asyncio.sleep(pause_s if waiting else 60)
        return {"type": "http.request", "body": waiting.pop(0), "more_body": True}

    async def send(message):
        answered.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "http_version": "1.1"}
    scope |= {"headers": [(b"content-type", b"application/json")], "server": ("test", 80), "scheme": "http"}
    asyncio.run(app(scope, receive, send))
    return answered


@pytest.mark.parametrize("chunks", [[b'{"prompt"'], [b" "] * 1000, []], ids=["half", "drops", "nothing"])
def test_a_body_that_does_not_come_is_not_waited_for(source, chunks):
    started = time.monotonic()
    start, body = ask_slowly(create_app(source, read_timeout_s=0.2), chunks, 0.01)
    assert 0.2 <= time.monotonic() - started < 5
    headers = dict(start["headers"])
    assert start["status"] == 408 and headers[b"connection"] == b"close" and b"x-request-id" in headers
    error = json.loads(body["body"])["error"]
    assert error["code"] == "request_timeout" and "after 0.2 s" in error["message"]


def test_a_client_that_goes_away_before_its_body_is_whole_is_not_answered(source, caplog):
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    answered = []

    async def receive():
        return messages.pop(0)

    async def send(message):
        answered.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": []}
    asyncio.run(create_app(source)(scope, receive, send))
    assert answered == [] and caplog.records == []


@pytest.mark.parametrize("path", ["/livez", "/v1/models", "/v1/missing"])
def test_every_answer_has_the_request_s_name(client, path):
    assert client.get(path, headers={"X-Request-Id": "mine-7"}).headers["x-request-id"] == "mine-7"
    first, second = (client.get(path).headers["x-request-id"] for _ in range(2))
    assert first != second and len(first) == 32
    for bad in ("x" * 129, '"<script>"', "a b", "", "ä"):
        name = client.get(path, headers={"X-Request-Id": bad.encode()}).headers["x-request-id"]
        assert name != bad and len(name) == 32
    twice = client.get(path, headers=[("X-Request-Id", "one"), ("X-Request-Id", "two")])
    assert len(twice.headers["x-request-id"]) == 32
