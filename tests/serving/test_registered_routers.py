"""Which registered routers serve beside the champion: the fastest, and those for other numbers of steps."""

import asyncio
import dataclasses
import json

import pytest
import torch
from registered_routers import Registry, make_watcher, recorded
from tiny_dit import SAMPLER, make_artifact, write_model

from harmonica.core.artifact import RouterArtifact
from harmonica.core.golden_sample import record_sample
from harmonica.models.loading import load_model
from harmonica.samplers import make_sampler
from pipelines.serving.image_request import ImageRequest, SettingRejected
from pipelines.serving.requests import EngineRequest
from pipelines.tracking import registry


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


@pytest.mark.parametrize("speedup", [0, "2"])
def test_a_damaged_version_keeps_no_other_from_being_served(model, store, speedup):
    routers = Registry(store)
    for run_id in ("damaged", "good"):
        routers.add(run_id, recorded(model, seed=1))
    config = routers.files("damaged") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"ideal_speedup": speedup}))
    engine, watcher = make_watcher(model, routers.uri)
    asyncio.run(watcher.poll())
    assert engine.images.version == "2"


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
