"""Images that are shown while they are drawn: server-sent events, as OpenAI's own client reads them."""

import asyncio
import base64
import io
import json
import pickle
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image
from ray.serve.exceptions import RequestCancelledError
from tiny_dit import make_artifact
from tiny_engine import CONFIG, make_engine

from harmonica.data.text_encoder import PromptTooLong
from harmonica.models.loading import load_model
from pipelines.serving.batching import Overloaded, TimedOut
from pipelines.serving.image_request import ImageRequest, SettingRejected
from pipelines.serving.images_api import create_app
from pipelines.serving.jobs import preview_steps
from pipelines.serving.remote_engine import RemoteEngine
from pipelines.serving.requests import REJECTIONS, EngineRequest
from pipelines.serving.server_sent_events import merge

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def source(model):
    return make_engine(load_model(model), make_artifact(model))


@pytest.fixture(scope="module")
def client(source):
    with TestClient(create_app(source), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def api(client):
    return openai.OpenAI(api_key="unused", base_url="http://testserver/v1", http_client=client)


def pixels(event):
    data = base64.b64decode(event["b64_json"] if isinstance(event, dict) else event.b64_json)
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def events(answer):
    """(name, data) of each event."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = [
        dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.split("\n\n")[:-1]
    ]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


def test_the_official_client_reads_previews_and_the_image(api):
    asked = {"prompt": "Sneaker", "quality": "medium", "output_format": "webp"}
    found = list(api.images.generate(**asked, stream=True, partial_images=3, extra_body={"seed": 4}))
    *previews, completed = found
    assert [type(each) for each in previews] == [ImageGenPartialImageEvent] * 3
    assert [each.partial_image_index for each in previews] == [0, 1, 2]
    assert isinstance(completed, ImageGenCompletedEvent)
    assert (completed.quality, completed.size, completed.output_format) == ("medium", "28x28", "webp")
    assert (completed.router_version, completed.seed, completed.usage.total_tokens) == ("3", 4, 0)
    for event in found:  # by the client's own types, which it does not hold answers to
        type(event).model_validate(event.model_dump(), strict=True)
    distances = [np.abs(pixels(each) - pixels(completed)).mean() for each in previews]
    assert distances[0] > distances[1] > distances[2] > 0
    alone = api.images.generate(**asked, extra_body={"seed": 4})
    assert alone.data[0].b64_json == completed.b64_json


@pytest.mark.parametrize("count", [None, 0])
def test_without_previews_there_is_one_event(client, count):
    found = events(client.post(PATH, json={"prompt": "Bag", "stream": True, "partial_images": count}))
    assert [name for name, _ in found] == ["image_generation.completed"]


def test_several_images_are_streamed_side_by_side_with_every_step(client):
    asked = {"prompt": "Bag", "seed": 2, "n": 2, "stream": True, "partial_images": 1, "progress": True}
    found = events(client.post(PATH, json=asked))
    assert all(name == data["type"] for name, data in found)
    for index in range(2):
        mine = [data for _, data in found if data["index"] == index]
        steps = [data["step"] for data in mine if data["type"].endswith("progress")]
        assert steps == list(range(1, 9))
        (preview,) = [data for data in mine if data["type"].endswith("partial_image")]
        assert (preview["step"], preview["num_inference_steps"]) == (4, 8)
        assert mine[-1]["type"] == "image_generation.completed" and mine[-1]["batch_size"] == 2
    whole = client.post(PATH, json={"prompt": "Bag", "seed": 2, "n": 2}).json()
    finished = {data["index"]: data["b64_json"] for name, data in found if name.endswith("completed")}
    assert [finished[0], finished[1]] == [entry["b64_json"] for entry in whole["data"]]


def test_what_is_refused_is_refused_by_a_status(client, api):
    answer = client.post(PATH, json={"prompt": "Bag", "stream": True, "num_inference_steps": 9})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "num_inference_steps"
    with pytest.raises(openai.BadRequestError, match="give a class name"):
        api.images.generate(prompt="cat", stream=True)


def test_a_failure_in_the_middle_reaches_the_client(source, api, monkeypatch):
    generate = source.images.generate

    def fail(requests, served, on_preview):
        generate(requests, served, on_preview)
        raise RuntimeError("secret path")

    monkeypatch.setattr(source.images, "generate", fail)
    seen = []
    with pytest.raises(openai.APIError, match="generating failed: the server's log says why"):
        for event in api.images.generate(prompt="Bag", stream=True, partial_images=2):
            seen.append(event)
    assert len(seen) == 2


def test_who_stops_watching_gives_up_the_place(model):
    async def run():
        config = replace(CONFIG, batch_wait_s=60)
        engine = make_engine(load_model(model), make_artifact(model), config=config)
        images = [ImageRequest(1, 1, index) for index in range(2)]
        requests = [EngineRequest(image, partial_images=3, group_size=3) for image in images]
        waiting = asyncio.create_task(anext(merge([engine.generate_stream(request) for request in requests])))
        while engine.batcher.num_waiting < 2:
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0.01)
        assert engine.batcher.num_waiting == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("num_steps", "count", "steps"),
    [(20, 3, (5, 10, 15)), (20, 1, (10,)), (8, 0, ()), (2, 3, (1,)), (3, 3, (1, 2)), (20, 2, (7, 13))],
)
def test_previews_are_evenly_spread(num_steps, count, steps):
    assert preview_steps(num_steps, count) == steps


def test_an_overloaded_source_says_so_before_the_stream(source, client, monkeypatch):
    def full():
        raise Overloaded(3)

    monkeypatch.setattr(source.batcher, "check_room", full)
    answer = client.post(PATH, json={"prompt": "Bag", "stream": True, "n": 2})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")


class Cancelled:
    """Calls of a handle that Serve has cancelled before what awaits them, since their client has gone."""

    def options(self, **_):
        return self

    generate = generate_stream = describe = property(lambda self: self)

    def remote(self, *_):
        return self

    def cancel(self):
        pass

    def __await__(self):
        raise RequestCancelledError("some-request")

    async def __aiter__(self):
        raise RequestCancelledError("some-request")
        yield

    async def _fetch_future_result_async(self) -> None: ...


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_serve_has_cancelled_is_no_failure(source, stream, caplog, monkeypatch):
    """An error is logged with its stack, a page for every client that went away."""
    remote = RemoteEngine(Cancelled())
    monkeypatch.setattr(remote, "describe", source.describe)
    with TestClient(create_app(remote)) as client, pytest.raises(CancelledError):
        client.post(PATH, json={"prompt": "Bag", "n": 2, "stream": stream})
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize(
    "rejection",
    [
        Overloaded(3),
        TimedOut(),
        SettingRejected("n", "n is 1: no"),
        PromptTooLong("prompt is long", 4, "prompt"),
    ],
)
def test_rejections_travel_between_processes(rejection):
    assert isinstance(rejection, REJECTIONS)
    copy = pickle.loads(pickle.dumps(rejection))
    assert type(copy) is type(rejection) and vars(copy) == vars(rejection) and str(copy) == str(rejection)
