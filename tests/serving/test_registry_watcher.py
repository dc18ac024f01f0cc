"""The champion is taken up when it proves to draw here, and refused when not: on a real MLflow store."""

import asyncio
import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from tiny_dit import SAMPLER, SHAPE, make_artifact, write_model
from tiny_engine import CONFIG

from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import record_sample
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from pipelines.serving.batching import Worker
from pipelines.serving.engine import GenerationEngine
from pipelines.serving.engine_loader import EngineLoader
from pipelines.serving.image_request import ImageRequest, SettingRejected
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.images_api import create_app
from pipelines.serving.registry_watcher import RegistryWatcher
from pipelines.serving.requests import EngineRequest
from pipelines.serving.serve_args import ServeArgs
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create, make_client

NAME = "tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store that others are copied from: making one costs seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("template")
        find_or_create("register", "first", str(folder), {})
    return folder


@pytest.fixture
def store(template, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(template, tmp_path / "store")
    return tmp_path / "store"


@dataclasses.dataclass
class Registry:
    """Registers routers under names, each the champion from then on."""

    store: Path
    uri: str = ""

    def add(self, run_id, artifact):
        run = find_or_create("register", run_id, str(self.store), {})
        self.uri = run.uri
        return registry.register(artifact.save(self.store / run_id), name=NAME, run=run)

    def files(self, run_id):
        """Where MLflow keeps a version's files."""
        run = find_or_create("register", run_id, str(self.store), {})
        root = run.client.get_run(run.mlflow_run_id).info.artifact_uri.removeprefix("file://")
        return Path(root) / "router"

    def move_alias(self, version):
        make_client(self.uri).set_registered_model_alias(NAME, registry.CHAMPION, version)


def make_watcher(model, uri):
    engine = GenerationEngine(ImageSampler(load_model(model)), NAME, CONFIG)
    return engine, RegistryWatcher(engine, ServeArgs(tracking_uri=uri, registered_model=NAME, model=model))


def recorded(model, seed):
    artifact = make_artifact(model, seed=seed)
    return record_sample(artifact, make_sampler(load_model(model).model, artifact.sampler))


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


def test_low_is_the_fastest_that_is_registered_and_can_be_used(model, store, tmp_path):
    routers = Registry(store)
    sampler = make_sampler(load_model(model).model, SAMPLER)

    def build(threshold):
        logits = make_artifact(model, seed=1).logits_TB
        built = RouterArtifact.build(logits, sampler, threshold=threshold, reuse="hold", training={})
        return record_sample(built, sampler)

    slow, fast, faster = build(0.3), build(0.6), build(0.7)
    assert fast.ideal_speedup > slow.ideal_speedup
    routers.add("fast", fast)
    routers.add("foreign", make_artifact(write_model(tmp_path / "other", seed=9)))
    routers.add("slow", slow)
    engine, watcher = make_watcher(model, routers.uri)

    async def run():
        await watcher.poll()
        versions = {quality: engine.images.plan_for(quality).version for quality in ("medium", "low")}
        assert versions == {"medium": "3", "low": "1"}
        routers.add("faster", faster)
        routers.move_alias("3")
        await watcher.poll()
        assert engine.images.version == "3" and engine.images.plan_for("low").version == "4"

    asyncio.run(run())


def test_a_version_out_of_reach_does_not_have_the_others_tried_again(model, store, monkeypatch):
    routers, tried = Registry(store), []
    sampler = make_sampler(load_model(model).model, SAMPLER)
    for run_id, threshold in (("fast", 0.7), ("lost", 0.5), ("slow", 0.3)):
        logits = make_artifact(model, seed=1).logits_TB
        built = RouterArtifact.build(logits, sampler, threshold=threshold, reuse="hold", training={})
        routers.add(run_id, record_sample(built, sampler))
    engine, watcher = make_watcher(model, routers.uri)
    load, is_lost = registry.load_version, True

    def load_some(name, version, uri):
        if version == "2" and is_lost:
            raise OSError("its files are gone")
        return load(name, version, uri)

    async def run():
        nonlocal is_lost
        monkeypatch.setattr(registry, "load_version", load_some)
        await watcher.poll()
        assert engine.images.plan_for("low").version == "1"
        try_out = engine.images.try_out
        monkeypatch.setattr(engine.images, "try_out", lambda *of: tried.append(of) or try_out(*of))
        for _ in range(3):
            await watcher.poll()
        assert not tried
        is_lost = False
        await watcher.poll()
        assert {"1", "2", "3"} <= set(watcher._loaded), "reached now"

    asyncio.run(run())


def test_the_number_of_steps_picks_the_router_that_was_made_for_it(model, store, tmp_path):
    routers, denoiser = Registry(store), load_model(model).model

    def build(steps, seed=0):
        sampler = make_sampler(denoiser, dataclasses.replace(SAMPLER, num_inference_steps=steps))
        shape = (steps, len(denoiser.branches))
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        built = RouterArtifact.build(logits, sampler, threshold=0.5, reuse="hold", training={})
        return record_sample(built, sampler)

    routers.add("four", build(4))
    routers.add("six", build(6))
    damaged = build(6, seed=1)  # newer, but its sample says it draws otherwise
    routers.add("differs", dataclasses.replace(damaged, sample_CHW=damaged.sample_CHW.flip(1)))
    routers.add("foreign", make_artifact(write_model(tmp_path / "foreign", seed=9)))
    routers.add("eight", build(8))
    engine, watcher = make_watcher(model, routers.uri)

    async def run():
        await watcher.poll()
        images = engine.images
        for quality in ("medium", "low"):
            picked = {steps: images.plan_for(quality, steps).version for steps in (4, 6, 8)}
            assert picked == {4: "1", 6: "2", 8: "5"}
        assert images.plan_for("medium").version == "5"
        assert images.plan_for("high", 6).version == "uncached"
        with pytest.raises(SettingRejected, match="made for 8, others for 4 and 6: leave it out"):
            images.plan_for("medium", 5)
        asked = ImageRequest(1, 1, 0)
        few = await engine.generate(EngineRequest(asked, num_inference_steps=4))
        assert (few.router_version, few.num_inference_steps) == ("1", 4)
        served = images.plan_for("medium", 4)
        routers.add("four again", build(4, seed=2))
        routers.move_alias("5")
        await watcher.poll()
        assert images.plan_for("medium", 4).version == "6", "the newest of them"
        assert (await engine.generate(EngineRequest(asked, num_inference_steps=6))).router_version == "2"
        routers.move_alias("1")
        await watcher.poll()
        assert images.version == "1" and images.plan_for("medium", 8).version == "5", "rolled back"
        assert images.plan_for("medium", 4) is images.champion is not served
        card = await engine.describe()
        uses = {router.version: router.quality for router in card.routers}
        assert uses["2"] == uses["5"] == () and "medium" in uses["1"]

    asyncio.run(run())


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
