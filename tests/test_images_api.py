"""The endpoint as clients see it, over the real sampler in this process; Serve itself is in test_serve."""

import asyncio
import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from tiny_dit import make_artifact, write_model
from tiny_engine import CONFIG, make_engine, slow_steps

from harmonica.evaluation.fashion_mnist import CLASS_NAMES
from harmonica.evaluation.plots import encode_picture
from harmonica.models.loading import load_model
from harmonica.validation.finite import NotFinite
from pipelines.serving.batching import Overloaded
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.images_api import MAX_BODY_BYTES, create_app
from pipelines.serving.requests import REJECTIONS

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    return make_engine(load_model(model), make_artifact(model), fastest=make_artifact(model, seed=5))


@pytest.fixture(scope="module")
def client(source):
    with TestClient(create_app(source), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def failing(source):
    def fail(error):
        source.error = error

    yield fail
    source.error = None


def refused(answer, status, param, code):
    """The message, once the answer is an error in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert (error["param"], error["code"]) == (param, code)
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    return error["message"]


def picture(entry):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))


def test_answer_holds_images_and_how_they_were_made(client, source):
    answer = client.post(PATH, json={"prompt": "ankle BOOT", "n": 3, "seed": 5})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["seed"] == 5 and body["size"] == "28x28" and body["output_format"] == "png"
    assert body["router_version"] == "3" and body["batch_size"] == 3
    assert (body["quality"], body["num_inference_steps"], body["guidance_scale"]) == ("medium", 8, 2.0)
    assert body["cur"] == pytest.approx(source.images.champion.plan.cur)
    assert body["inference_time_s"] > 0 and body["created"] > 1.7e9
    assert [entry["revised_prompt"] for entry in body["data"]] == ["Ankle boot"] * 3
    images = [picture(entry) for entry in body["data"]]
    assert {image.shape for image in images} == {(28, 28)}
    expected = source.images.generate([ImageRequest(9, 5, index) for index in range(3)])
    pictures = [base64.b64decode(entry["b64_json"]) for entry in body["data"]]
    assert pictures == [encode_picture(image) for image in expected]


def test_without_a_seed_images_differ_and_the_seed_drawn_gives_them_again(client):
    first, second = (client.post(PATH, json={"prompt": "Bag"}).json() for _ in range(2))
    assert first["seed"] != second["seed"] and first["data"] != second["data"]
    again = client.post(PATH, json={"prompt": "8", "seed": first["seed"]}).json()
    assert again["data"] == first["data"]
    assert first["seed"] < 2**53, "a JSON number that JavaScript reads exactly"


def test_what_openai_has_and_this_model_has_not_is_ignored(client):
    extras = {"user": "me", "style": "vivid", "background": "auto", "moderation": "low", "complexity": "low"}
    names = ("model", "n", "size", "response_format", "stream", "quality", "output_format", "partial_images")
    nothing = dict.fromkeys(names)
    answer = client.post(PATH, json={"prompt": "Coat", "seed": 2**62, **extras, **nothing})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["data"]) == 1


@pytest.mark.parametrize("size", ["auto", "28x28"])
def test_its_own_size_and_name_are_accepted(client, size):
    assert client.post(PATH, json={"prompt": "Coat", "size": size, "model": "tiny"}).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "param", "code", "said"),
    [
        ({"prompt": "cat"}, 400, "prompt", "unknown_class", "'cat': give a class name (T-shirt/top, Trouser"),
        ({"prompt": "10"}, 400, "prompt", "unknown_class", "a number from 0 to 9"),
        ({"prompt": "-1"}, 400, "prompt", "unknown_class", "'-1'"),
        ({"prompt": "٣"}, 400, "prompt", "unknown_class", "'٣'"),
        ({"prompt": ""}, 400, "prompt", "invalid_value", "at least 1 character"),
        ({"prompt": "x" * 4097}, 400, "prompt", "invalid_value", "at most 4096 characters"),
        ({"prompt": 3}, 400, "prompt", "invalid_value", "prompt is 3: it should be a valid string"),
        ({"prompt": "\ud800"}, 400, None, "invalid_json", "the body is not JSON"),
        (
            {"prompt": " \t\u3000\u200b\n"},
            400,
            "prompt",
            "invalid_value",
            "blank: say what to generate",
        ),
        ({"n": 0}, 400, "n", "invalid_value", "n is 0: it should be greater than or equal to 1"),
        ({"n": 5}, 400, "n", "integer_above_max_value", "n is 5: give 1 to 4"),
        ({"n": "2"}, 400, "n", "invalid_value", "n is '2': it should be a valid integer"),
        ({"n": True}, 400, "n", "invalid_value", "n is True"),
        ({"n": 10**30}, 400, "n", "integer_above_max_value", "give 1 to 4"),
        ({"seed": -1}, 400, "seed", "invalid_value", "seed is -1"),
        ({"seed": 2**62 + 1}, 400, "seed", "invalid_value", "less than or equal to"),
        ({"seed": 1.5}, 400, "seed", "invalid_value", "seed is 1.5"),
        (
            {"response_format": "url"},
            400,
            "response_format",
            "invalid_value",
            "'url': it should be 'b64_json'",
        ),
        ({"output_format": "gif"}, 400, "output_format", "invalid_value", "'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, 400, "output_compression", "invalid_value", "give jpeg or webp"),
        (
            {"output_compression": 101},
            400,
            "output_compression",
            "invalid_value",
            "less than or equal to 100",
        ),
        ({"quality": "best"}, 400, "quality", "invalid_value", "'low', 'medium', 'high'"),
        ({"stream": 1}, 400, "stream", "invalid_value", "stream is 1"),
        ({"stream": True, "partial_images": 4}, 400, "partial_images", "invalid_value", "less than or equal"),
        ({"partial_images": 2}, 400, "partial_images", "invalid_value", "set stream, or leave it out"),
        ({"progress": True}, 400, "progress", "invalid_value", "set stream, or leave it out"),
        ({"num_inference_steps": 9}, 400, "num_inference_steps", "invalid_value", "3 of quality medium was"),
        (
            {"num_inference_steps": 31, "quality": "high"},
            400,
            "num_inference_steps",
            "invalid_value",
            "num_inference_steps is 31: give 2 to 30",
        ),
        (
            {"guidance_scale": 4, "quality": "low"},
            400,
            "guidance_scale",
            "invalid_value",
            "give quality high",
        ),
        ({"guidance_scale": 0.5}, 400, "guidance_scale", "invalid_value", "greater than or equal to 1"),
        ({"guidance_scale": float("nan")}, 400, None, "invalid_json", "the body is not JSON"),
        ({"size": "1024x1024"}, 400, "size", "invalid_value", "this model generates 28x28"),
        ({"model": "dall-e-3"}, 404, "model", "model_not_found", "this endpoint serves 'tiny'"),
        ({"sed": 3}, 400, "sed", "unknown_parameter", "unknown parameter sed"),
        ({"a b": 3}, 400, "'a b'", "unknown_parameter", "unknown parameter 'a b'"),
        ({"\ud800": 3}, 400, None, "invalid_json", "the body is not"),
    ],
)
def test_refusals_name_field_value_and_cure(client, change, status, param, code, said):
    body = json.dumps({"prompt": "Bag"} | change)
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert said in refused(answer, status, param, code)


def test_a_missing_prompt_is_named(client):
    assert refused(client.post(PATH, json={"n": 1}), 400, "prompt", "missing_required_parameter")


NO_JSON_OBJECTS = {
    "cut off": b'{"prompt": "Bag"',
    "empty": b"",
    "a list": b'[{"prompt": "Bag"}]',
    "a number": b"3",
    "nothing": b"null",
    "two": b'{"prompt": "Bag"} {}',
    "a comma more": b'{"prompt": "Bag",}',
    "other quotes": b"{'prompt': 'Bag'}",
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "Bag"}'.encode("utf-16"),
    "half a character": b'{"prompt": "\\ud83d"}',
    "depth": b'{"prompt": "Bag", "user": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "digits": b'{"prompt": "Bag", "n": ' + b"9" * 5000 + b"}",
    "NaN": b'{"prompt": "Bag", "guidance_scale": NaN}',
    "Infinity": b'{"prompt": "Bag", "timeout_s": Infinity}',
    "-Infinity": b'{"prompt": "Bag", "user": -Infinity}',
}


@pytest.mark.parametrize("body", NO_JSON_OBJECTS.values(), ids=NO_JSON_OBJECTS)
def test_what_is_no_json_object_is_refused(client, body):
    answer = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert "the body is not" in refused(answer, 400, None, "invalid_json")


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", None]
)
def test_another_content_type_is_refused(client, kind):
    headers = {"content-type": kind} if kind else {}
    answer = client.post(PATH, content=b'{"prompt": "Bag"}', headers=headers)
    assert "Content-Type: application/json" in refused(answer, 400, None, "invalid_json")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/vnd.api+json"])
def test_json_by_its_other_names_is_read_and_a_byte_order_mark_passed_over(client, kind):
    body = b'\xef\xbb\xbf{"prompt": "Bag", "n": 1.0}'
    assert client.post(PATH, content=body, headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body_is_refused(client, chunked):
    body = b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}'
    content = iter([body[:1000], body[1000:]]) if chunked else body
    answer = client.post(PATH, content=content, headers={"content-type": "application/json"})
    assert str(MAX_BODY_BYTES) in refused(answer, 413, None, "request_too_large")


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


FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@pytest.mark.parametrize("kind", FORMATS)
def test_pictures_come_in_the_format_asked_for(client, kind):
    asked = {"prompt": "Bag", "seed": 3, "output_format": kind}
    body = client.post(PATH, json=asked).json()
    data = base64.b64decode(body["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).format == FORMATS[kind] and body["output_format"] == kind
    if kind != "png":
        smaller = client.post(PATH, json=asked | {"output_compression": 20}).json()
        assert len(base64.b64decode(smaller["data"][0]["b64_json"])) < len(data)


def test_quality_picks_the_router(client, source):
    def ask(**settings):
        body = client.post(PATH, json={"prompt": "Bag", "seed": 3} | settings).json()
        return body["quality"], body["router_version"], body["cur"] > 0, body["num_inference_steps"]

    assert ask() == ask(quality="auto") == ask(quality="standard") == ("medium", "3", True, 8)
    assert ask(quality="low") == ("low", "fast", True, 8)
    assert ask(quality="high") == ask(quality="hd") == ("high", "uncached", False, 8)
    assert ask(quality="high", num_inference_steps=12, guidance_scale=3) == ("high", "uncached", False, 12)
    assert ask(num_inference_steps=8, guidance_scale=2) == ("medium", "3", True, 8), "its own are no others"


def test_routers(client, source):
    routers = {entry["id"]: entry for entry in client.get("/v1/routers").json()["data"]}
    assert {name: entry["quality"] for name, entry in routers.items()} == {
        "uncached": ["high"],
        "3": ["medium"],
        "fast": ["low"],
    }
    champion = routers["3"]
    assert champion["plan"] == source.images.champion.plan.to_strings()
    assert len(champion["scores"]) == 8 and len(champion["scores"][0]) == len(champion["plan"][0]) == 6
    assert champion["ideal_speedup"] > 1 and routers["uncached"]["scores"] == []


def test_models(client):
    (entry,) = client.get("/v1/models").json()["data"]
    assert entry["id"] == "tiny" and entry["object"] == "model" and entry["size"] == "28x28"
    assert entry["class_names"] == list(CLASS_NAMES)
    assert client.get("/v1/models/tiny").json() == entry
    refused(client.get("/v1/models/huge"), 404, "model", "model_not_found")


def test_health_says_what_is_served(client, failing):
    healthy = client.get("/healthz").json()
    assert (healthy["status"], healthy["model"], healthy["router_version"]) == ("ok", "tiny", "3")
    assert 0 < healthy["cur"] < 1
    failing(Overloaded())
    assert client.get("/healthz").json() == healthy | {"status": "busy"}


def test_overload_asks_to_come_again(client, failing):
    failing(Overloaded(7))
    answer = client.post(PATH, json={"prompt": "Bag", "n": 2})
    assert "try again in 7 s" in refused(answer, 503, None, "overloaded")
    assert answer.headers["retry-after"] == "7"


def test_a_failure_inside_shows_nothing_of_the_inside(client, failing):
    failing(RuntimeError("secret path /srv/weights"))
    answer = client.post(PATH, json={"prompt": "Bag"})
    assert "secret" not in refused(answer, 500, None, "internal_error")


def test_documentation_is_on(client):
    assert client.get("/docs").status_code == 200
    schema = client.get("/openapi.json").json()
    assert {PATH, "/v1/models", "/healthz"} <= schema["paths"].keys()


def test_the_official_client(client):
    api = openai.OpenAI(api_key="unused", base_url="http://testserver/v1", http_client=client)
    answer = api.images.generate(prompt="Sneaker", n=2, extra_body={"seed": 4})
    assert len(answer.data) == 2 and answer.size == "28x28" and answer.seed == 4
    assert [model.id for model in api.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError) as refusal:
        api.images.generate(prompt="cat")
    assert (refusal.value.param, refusal.value.code) == ("prompt", "unknown_class")
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("huge")


def test_who_waits_for_too_long_is_told_so(tmp_path):
    model = write_model(tmp_path)
    engine = make_engine(load_model(model), make_artifact(model))
    slow_steps(engine, 0.05)
    with TestClient(create_app(engine)) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.post, PATH, json={"prompt": "Bag", "seed": 1})
        while not engine.batcher.is_busy:
            time.sleep(0.005)
        answer = client.post(PATH, json={"prompt": "Bag", "timeout_s": 0.1})
        assert "larger timeout_s" in refused(answer, 504, None, "timeout")
        answer = client.post(PATH, json={"prompt": "Bag", "timeout_s": 0.1, "stream": True})
        assert answer.status_code == 504
        assert first.result().status_code == 200


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


def test_ready_is_who_would_draw_now_and_alive_who_answers(client, source, failing, monkeypatch):
    assert client.get("/readyz").json() == {"status": "ready"}
    failing(Overloaded(1))
    refused(client.get("/readyz"), 503, None, "not_ready")
    assert client.get("/livez").json() == {"status": "alive"}
    failing(None)
    assert client.get("/readyz").status_code == 200
    monkeypatch.setattr(type(source.batcher), "num_waiting", CONFIG.max_waiting)
    assert client.get("/readyz").headers["retry-after"] == "1"


def test_a_trajectory_that_stands_still_is_no_health(source, monkeypatch):
    source.check_health()
    monkeypatch.setattr(source, "_began", time.perf_counter() - CONFIG.stall_timeout_s - 1)
    with pytest.raises(RuntimeError, match=r"more than serve\.stall_timeout_s"):
        source.check_health()


@pytest.fixture
def spoilt(source, monkeypatch):
    """Every row of seed 13 is drawn as NaN, in the last value alone."""
    generate = source.images.generate

    def spoil(requests, served=None, on_preview=None):
        images = generate(requests, served, on_preview).clone()
        for request, image in zip(requests, images):
            if request.seed == 13:
                image[-1, -1, -1] = torch.nan
        return images

    monkeypatch.setattr(source.images, "generate", spoil)


def test_a_row_that_is_not_finite_fails_alone(client, source, spoilt, caplog):
    """Never a black picture with 200; those of its batch get theirs."""
    slow = {"prompt": "Bag", "n": 2}
    with ThreadPoolExecutor(3) as pool, caplog.at_level("ERROR", logger="ray.serve"):
        answers = list(pool.map(lambda seed: client.post(PATH, json=slow | {"seed": seed}), (12, 13, 14)))
    assert [answer.status_code for answer in answers] == [200, 500, 200]
    assert all(len(answers[i].json()["data"]) == 2 for i in (0, 2))
    message = refused(answers[1], 500, None, "internal_error")
    assert message == "generating failed: the server's log says why"
    said = [record.getMessage() for record in caplog.records]
    assert said and all(
        line.startswith("image not generated, quality medium with champion 3, seed 13, index ")
        for line in said
    )
    assert "images are not finite (1 of 1)" in said[0]
    assert not any(record.exc_info for record in caplog.records), "one line, no page of stack"
    assert NotFinite in REJECTIONS, "a replica returns it: of what one raises, Serve logs the stack"


@pytest.mark.parametrize("partial_images", [0, 1])
def test_a_stream_of_what_is_not_finite_ends_with_the_error(client, spoilt, partial_images):
    body = {"prompt": "Bag", "seed": 13, "stream": True, "partial_images": partial_images}
    answer = client.post(PATH, json=body)
    if not partial_images:
        refused(answer, 500, None, "internal_error")
        return
    assert answer.text.count("event: image_generation.partial_image") == 1
    assert "event: error" in answer.text and "completed" not in answer.text
