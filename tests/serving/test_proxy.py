"""What stands in Serve's HTTP proxy: who is asked again, who is not, and what a client reads."""

import asyncio
import json
import pickle

import httpx
import pytest
from ray.serve._private.http_util import (
    ASGIReceiveProxy,
    MessageQueue,
    validate_http_proxy_callback_return,
)
from ray.serve._private.proxy import HTTPProxy
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

from pipelines.serving import proxy
from pipelines.serving.proxy import RetryLost, middlewares
from pipelines.serving.request_bodies import ReadBody


class Replicas:
    """Answers in turn; each request's body is kept."""

    def __init__(self, *answers):
        self.answers, self.bodies = list(answers), []

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        await self.answers.pop(0)(scope, receive, send)


LOST, FULL = PlainTextResponse("Internal Server Error", 500), PlainTextResponse("Service Unavailable", 503)
OWN = JSONResponse({"error": {"code": "internal_error"}}, 500)


def ask(replicas, body=b'{"seed": 1}', path="/v1/images/generations", headers=None):
    async def inside():
        transport = httpx.ASGITransport(RetryLost(replicas))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=body, headers=headers)

    return asyncio.run(inside())


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(proxy, "_PAUSE_S", 0)


async def nothing(scope, receive, send):
    pass


def test_what_a_lost_replica_was_asked_another_is_asked():
    replicas = Replicas(LOST, nothing, JSONResponse({"fine": True}))
    answer = ask(replicas)
    assert (answer.status_code, answer.json()) == (200, {"fine": True})
    assert replicas.bodies == [b'{"seed": 1}'] * 3


def test_an_answer_of_the_application_is_passed_on_whatever_it_says():
    for given in (OWN, JSONResponse({}, 503), PlainTextResponse("gone", 404)):
        replicas = Replicas(given)
        assert ask(replicas).status_code == given.status_code and len(replicas.bodies) == 1


def test_a_stream_is_passed_on_as_it_comes():
    async def events():
        yield b"one"
        yield b"two"

    assert ask(Replicas(StreamingResponse(events(), media_type="text/event-stream"))).content == b"onetwo"


def test_a_full_queue_is_not_asked_again_and_no_replica_at_all_is_told_in_openai_s_shape():
    for replicas, asked in ((Replicas(FULL), 1), (Replicas(*[LOST] * 9), 4)):
        answer = ask(replicas)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        error = json.loads(answer.content)["error"]
        assert (error["type"], error["code"]) == ("server_error", "unavailable")
        assert len(replicas.bodies) == asked


def test_what_is_too_large_to_be_kept_is_asked_once_and_in_whole():
    body = b"x" * (proxy._MAX_BODY_BYTES + 10)
    replicas = Replicas(JSONResponse({}))
    assert ask(replicas, body).status_code == 200 and replicas.bodies == [body]


def test_a_client_that_has_gone_is_not_asked_for_again():
    async def wait(scope, receive, send):
        assert (await receive())["type"] == "http.disconnect"

    async def inside():
        messages = [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]

        async def receive():
            return messages.pop(0)

        replicas = Replicas(wait, wait)
        await RetryLost(replicas)({"type": "http", "path": "/v1", "headers": []}, receive, None)
        assert len(replicas.bodies) == 1

    asyncio.run(inside())


def test_of_a_body_that_comes_in_parts_the_next_replica_gets_all():
    async def parts():
        for _ in range(3):
            yield b"part"

    class LostHalfway(Replicas):
        async def __call__(self, scope, receive, send):
            if self.bodies:
                await super().__call__(scope, receive, send)
            else:
                self.bodies.append((await receive())["body"])

    replicas = LostHalfway(JSONResponse({}))
    assert ask(replicas, parts()).status_code == 200
    assert replicas.bodies == [b"part", b"part" * 3]


def test_what_comes_slowly_is_passed_on_as_it_comes():
    """It is for the application to say how long a body may take."""
    first_is_read = asyncio.Event()

    async def answer_early(scope, receive, send):
        assert (await receive())["body"] == b"half"
        first_is_read.set()
        await JSONResponse({}, 408)(scope, receive, send)

    async def halves():
        yield b"half"
        await asyncio.wait_for(first_is_read.wait(), 5)
        yield b"rest"

    assert ask(answer_early, halves()).status_code == 408


async def echo(scope, receive, send):
    await PlainTextResponse(await Request(scope, receive).body())(scope, receive, send)
    assert (await receive())["type"] == "http.disconnect", "the body comes once"


async def lost_before_it_accepted(scope, receive, send):
    """Serve's proxy, whose first replica took the body and died, so that it asks a second one by itself."""
    queue = MessageQueue()
    passing = asyncio.create_task(HTTPProxy.proxy_asgi_receive(None, receive, queue))
    await queue.wait_for_message()
    queue.get_messages_nowait()  # with the first replica

    async def fetch(_):
        await queue.wait_for_message()
        return pickle.dumps(queue.get_messages_nowait())

    second = ASGIReceiveProxy(scope, None, fetch)
    fetching = asyncio.create_task(second.fetch_until_disconnect())
    await ReadBody(echo, max_bytes=100, timeout_s=0.5)(pickle.loads(pickle.dumps(scope)), second, send)
    passing.cancel()
    fetching.cancel()


def ask_once(app, headers, *parts):
    """Status and body of the answer to a client that sends these parts and goes once it is answered."""
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    waiting[-1]["more_body"] = False
    answered, has_answer = [], asyncio.Event()

    async def receive():
        if not waiting:
            await has_answer.wait()
            return {"type": "http.disconnect"}
        if len(waiting) < len(parts):
            await asyncio.sleep(0.1)
        return waiting.pop(0)

    async def send(message):
        answered.append(message)
        if message["type"] == "http.response.body":
            has_answer.set()

    scope = {"type": "http", "method": "POST", "path": "/v1", "headers": headers}
    asyncio.run(app(scope, receive, send))
    return answered[0]["status"], answered[1]["body"]


@pytest.mark.parametrize("body", [b'{"seed": 1}', b""])
def test_a_body_that_a_lost_replica_took_reaches_the_one_that_serve_asks_instead(body):
    headers = [(b"content-length", str(len(body)).encode())] if body else []
    assert ask_once(RetryLost(lost_before_it_accepted), headers, body) == (200, body)


def test_a_body_that_is_not_sent_along_is_missed_within_the_time_for_reading():
    """Of more than 256 KiB, or without a declared size: the client reads 408, and may send it again."""
    for headers in ([(b"transfer-encoding", b"chunked")], [(b"content-length", b"300000")]):
        status, body = ask_once(RetryLost(lost_before_it_accepted), headers, b"x")
        assert status == 408 and b"send the request again" in body


def test_what_is_sent_along_is_bounded_as_any_body_is():
    status, body = ask_once(RetryLost(lost_before_it_accepted), [(b"content-length", b"101")], b"x" * 101)
    assert status == 413 and b"more than 100 bytes" in body


def test_a_declared_body_that_does_not_come_in_time_is_passed_on_as_it_comes(monkeypatch):
    monkeypatch.setattr(proxy, "_BODY_S", 0.01)

    async def whole(scope, receive, send):
        assert "extensions" not in scope
        await echo(scope, receive, send)

    assert ask_once(RetryLost(whole), [(b"content-length", b"4")], b"ha", b"lf") == (200, b"half")


class Named:
    """Says what it was called, as Serve's own middleware does with any name there is."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)

    async def __call__(self, scope, receive, send):
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        answer = JSONResponse([value.decode() for value in given])
        await (LOST if self.statuses and self.statuses.pop(0) == 500 else answer)(scope, receive, send)


def test_a_request_s_name_is_a_good_one_before_serve_sees_it():
    assert ask(Named(), headers={"X-Request-Id": "mine-7"}).json() == ["mine-7"]
    for bad in ("x" * 300, '"<>', "a b", "ä", ""):
        (name,) = ask(Named(), headers={"X-Request-Id": bad.encode()}).json()
        assert name != bad and len(name) == 32
    (one,), (other,) = ask(Named()).json(), ask(Named(), headers=[("x-request-id", "a")] * 2).json()
    assert len(one) == len(other) == 32
    refused = ask(Named(*[500] * 9), headers={"X-Request-Id": "mine-7"})
    assert refused.status_code == 503 and refused.headers["x-request-id"] == "mine-7"


def test_serve_takes_it():
    assert [each.cls for each in validate_http_proxy_callback_return(middlewares())] == [RetryLost]
