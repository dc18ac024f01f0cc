"""What Prometheus is told, number by number; that it arrives there is in test_serve."""

import asyncio
from collections import defaultdict

import pytest
from tiny_dit import make_artifact, write_model
from tiny_engine import CONFIG, make_engine

from harmonica.models.loading import load_model
from pipelines.serving import metrics as serve_metrics
from pipelines.serving.batching import Overloaded
from pipelines.serving.image_request import ImageRequest, SettingRejected
from pipelines.serving.requests import EngineRequest


@pytest.fixture
def told(monkeypatch):
    """Everything recorded, by metric and its tag."""
    values = defaultdict(list)

    class Recorder:
        def __init__(self, name, *_):
            self._name = name

        def record(self, value, tags=None):
            (tag,) = (tags or {"": ""}).values()
            values[self._name, tag].append(value)

        inc = set = observe = record

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(serve_metrics, kind, Recorder)
    return values


@pytest.fixture
def engine(told, tmp_path):
    model = write_model(tmp_path)
    engine = make_engine(load_model(model), make_artifact(model))
    engine.metrics = serve_metrics.ServeMetrics()
    return engine


def test_a_trajectory(engine, told):
    async def generate():
        requests = [EngineRequest(ImageRequest(1, 1, index), group_size=3) for index in range(3)]
        images = await asyncio.gather(*map(engine.generate, requests))
        await engine.generate(EngineRequest(ImageRequest(1, 1, 0), "high"))
        return images[0]

    image = asyncio.run(generate())
    assert told["harmonica_images", "3"] == [3] and told["harmonica_images", "uncached"] == [1]
    assert told["harmonica_batch_size", "3"] == [3]
    assert told["harmonica_cache_ratio", "3"] == [image.cur] and image.cur > 0
    assert told["harmonica_step_seconds", "3"] == [pytest.approx(image.seconds / 8)]
    waits = told["harmonica_queue_wait_seconds", "3"]
    assert len(waits) == 3 and all(0 <= wait < 5 for wait in waits)
    assert told["harmonica_waiting", ""][-1] == 0


def test_rejections_by_reason(engine, told, monkeypatch):
    async def ask(**settings):
        await engine.generate(EngineRequest(ImageRequest(1, 1, 0), **settings))

    with pytest.raises(SettingRejected):
        asyncio.run(ask(num_inference_steps=9))
    assert not told, "a mistake in a request is no matter of load"
    monkeypatch.setattr(type(engine.batcher), "num_waiting", CONFIG.max_waiting)
    monkeypatch.setattr(engine.batcher, "_waiting", [None] * CONFIG.max_waiting)
    with pytest.raises(Overloaded):
        asyncio.run(ask())
    assert told["harmonica_refused", "overloaded"] == [1]


def test_the_champion_served_and_one_refused(told):
    metrics = serve_metrics.ServeMetrics()
    for served, rejected in (("1", ""), ("1", "2"), ("1", "2"), ("3", "")):
        metrics.serving(served, rejected)
    assert told["harmonica_champion", "1"] == [1, 1, 1, 0] and told["harmonica_champion", "3"] == [1]
    assert told["harmonica_champion_refused", "2"] == [1, 1, 0]


def test_of_several_models_each_has_its_label(monkeypatch):
    values = []

    class Recorder:
        def __init__(self, name, *others):
            self._name, self._keys = name, others[-1]

        def record(self, value, tags=None):
            assert set(tags) == set(self._keys), "Ray refuses others"
            values.append((self._name, tags["model"]))

        inc = set = observe = record

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(serve_metrics, kind, Recorder)
    metrics = serve_metrics.ServeMetrics("dit")
    metrics.serving("1", "2")
    metrics.waiting(3)
    metrics.rejected("timeout")
    assert {name for name, _ in values} == {
        "harmonica_champion",
        "harmonica_champion_refused",
        "harmonica_waiting",
        "harmonica_refused",
    }
    assert {model for _, model in values} == {"dit"}
