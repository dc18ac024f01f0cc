"""The champion is taken up when it proves to draw here, and refused when not: on a real MLflow store."""

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient
from registered_routers import NAME, Registry, make_watcher, recorded
from tiny_dit import SHAPE, make_artifact, write_model
from tiny_engine import CONFIG

from harmonica.models.loading import load_model
from pipelines.serving.batching import Worker
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.engine_loader import EngineLoader
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.images_api import create_app
from pipelines.serving.registry_watcher import RegistryWatcher
from pipelines.serving.requests import EngineRequest
from pipelines.serving.serve_args import ServeArgs
from pipelines.tracking import registry


def test_what_cannot_be_served_is_refused_and_the_one_before_stays(model, store, tmp_path):
    routers = Registry(store)
    assert routers.add("good", recorded(model, 1)) == "1"
    engine, watcher = make_watcher(model, routers.uri)

    async def run():
        await watcher.poll()
        assert (engine.images.version, engine.rejected) == ("1", None)
        before = await engine.generate(EngineRequest(ImageRequest(1, 1, 0)))

        other = recorded(model, 2)  # its sample says it draws otherwise
        routers.add("differs", dataclasses.replace(other, sample_CHW=other.sample_CHW.flip(1)))
        await watcher.poll()
        assert engine.images.version == "1" and engine.rejected.version == "2"
        assert "the router's sample differs by" in engine.rejected.reason

        routers.add("damaged", recorded(model, 3))
        (routers.files("damaged") / "router.safetensors").write_bytes(b"damaged")
        await watcher.poll()
        assert engine.rejected.version == "3" and "router.safetensors" in engine.rejected.reason

        foreign = write_model(tmp_path / "foreign", shape=dataclasses.replace(SHAPE, num_layers=2))
        routers.add("foreign", make_artifact(foreign))
        await watcher.poll()
        assert engine.rejected.version == "4" and "model.num_layers is 3" in engine.rejected.reason

        after = await engine.generate(EngineRequest(ImageRequest(1, 1, 0)))
        assert (after.picture, after.router_version) == (before.picture, "1")
        card = await engine.describe()
        assert card.rejected == engine.rejected

        routers.move_alias("1")
        await watcher.poll()
        assert engine.rejected is None, "rolled back"
        assert routers.add("better", recorded(model, 5)) == "5"
        await watcher.poll()
        assert (engine.images.version, engine.rejected) == ("5", None)

    asyncio.run(run())


def test_a_refusal_is_seen_in_health(model, store):
    routers = Registry(store)
    routers.add("good", recorded(model, 1))
    engine, watcher = make_watcher(model, routers.uri)
    other = recorded(model, 2)

    async def run():
        await watcher.poll()
        routers.add("differs", dataclasses.replace(other, sample_CHW=other.sample_CHW.flip(1)))
        await watcher.poll()

    asyncio.run(run())
    with TestClient(create_app(engine)) as client:
        health = client.get("/healthz").json()
    assert (health["status"], health["router_version"]) == ("ok", "1")
    assert health["refused"]["version"] == "2" and "differs by" in health["refused"]["reason"]


def test_what_was_refused_for_good_is_not_tried_again_and_an_outage_is(model, store, monkeypatch):
    routers, tried = Registry(store), []
    routers.add("good", recorded(model, 1))
    engine, watcher = make_watcher(model, routers.uri)
    load = registry.load_version

    def count(name, version, uri):
        tried.append(version)
        if version == "2" and len(tried) < 4:
            raise OSError("the store is down")
        return load(name, version, uri)

    async def run():
        await watcher.poll()
        monkeypatch.setattr(registry, "load_version", count)
        other = recorded(model, 2)
        routers.add("differs", dataclasses.replace(other, sample_CHW=other.sample_CHW.flip(1)))
        for _ in range(3):
            await watcher.poll()
            assert engine.rejected.reason == "the store is down"
        for _ in range(3):
            await watcher.poll()
            assert "differs by" in engine.rejected.reason
        assert tried == ["2"] * 4

    asyncio.run(run())


def test_the_first_router_of_all_is_not_refused_in_silence(model, store):
    routers, other = Registry(store), recorded(model, 2)
    routers.add("differs", dataclasses.replace(other, sample_CHW=other.sample_CHW.flip(1)))
    _, watcher = make_watcher(model, routers.uri)
    with pytest.raises(ValueError, match="the router's sample differs"):
        asyncio.run(watcher.poll())


def test_a_model_is_loaded_again_while_the_registry_is_down(model, store, monkeypatch):
    routers, fetched = Registry(store), []
    routers.add("good", recorded(model, 1))
    args = ServeArgs(tracking_uri=routers.uri, registered_model=NAME, model=model, follow_s=60)
    loader = EngineLoader(args, NAME, None, Worker())
    load = registry.load_version

    def count(name, version, uri):
        fetched.append(version)
        return load(name, version, uri)

    async def run():
        monkeypatch.setattr(registry, "load_version", count)
        first = (await loader.load()).acquire()
        image = await first.generate(EngineRequest(ImageRequest(1, 1, 0)))
        assert set(fetched) == {"1"}
        fetched.clear()
        again = (await loader.load()).acquire()
        assert again.images is not first.images and fetched == [], "kept in memory"

        def down(*_):
            raise OSError("the registry is down")

        for name in ("resolve", "newest_versions", "load_version"):
            monkeypatch.setattr(registry, name, down)
        resumed = (await loader.load()).acquire()
        assert resumed.images.version == "1" and resumed.images.plan_for("low").version == "1"
        assert (await resumed.generate(EngineRequest(ImageRequest(1, 1, 0)))).picture == image.picture

    asyncio.run(run())


def test_in_a_process_that_ends_nobody_looks_and_nothing_is_logged(model, caplog):
    engine = GenerationEngine(ImageSampler(load_model(model)), NAME, CONFIG)
    args = ServeArgs(tracking_uri="sqlite:///unread.db", registered_model=NAME, model=model, follow_s=0.01)

    async def run():
        executor = ThreadPoolExecutor()
        executor.shutdown()
        asyncio.get_running_loop().set_default_executor(executor)
        await asyncio.wait_for(RegistryWatcher(engine, args).run(), 10)

    asyncio.run(run())
    assert not caplog.records
