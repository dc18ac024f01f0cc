"""What clients and probes are told when the engine is busy, slow, broken or draws what is not finite."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from images_endpoint import PATH, refused
from tiny_dit import make_artifact, write_model
from tiny_engine import CONFIG, make_engine, slow_steps

from harmonica.models.loading import load_model
from harmonica.validation.finite import NotFinite
from pipelines.serving.batching import Overloaded
from pipelines.serving.images_api import create_app
from pipelines.serving.requests import REJECTIONS


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


def test_ready_is_who_would_draw_now_and_alive_who_answers(client, source, failing, monkeypatch):
    assert client.get("/readyz").json() == {"status": "ready"}
    failing(Overloaded(1))
    refused(client.get("/readyz"), 503, None, "not_ready")
    assert client.get("/livez").json() == {"status": "alive"}
    failing(None)
    assert client.get("/readyz").status_code == 200
    monkeypatch.setattr(type(source.batcher), "num_waiting", CONFIG.max_waiting)
    assert client.get("/readyz").headers["retry-after"] == "1"


def test_who_asks_for_health_at_the_same_time_gets_one_answer(source, monkeypatch):
    asked, describe = 0, source.describe

    async def slowly():
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.05)
        return await describe()

    async def run():
        app = create_app(source, ("key",))
        transport = httpx.ASGITransport(app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            monkeypatch.setattr(source, "describe", slowly)
            asks = [client.get(f"http://a/{path}") for path in ("healthz", "readyz") for _ in range(50)]
            leaving = asyncio.create_task(client.get("http://a/healthz"))
            await asyncio.sleep(0.01)
            leaving.cancel()
            assert {answer.status_code for answer in await asyncio.gather(*asks)} == {200}
            assert asked == 1, "not one place in the replica's queue for each, without a key"
            assert (await client.get("http://a/healthz")).status_code == 200 and asked == 2

    asyncio.run(run())


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
