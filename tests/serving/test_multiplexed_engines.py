"""Several models in one replica, by Ray's own multiplexing and without a cluster: loads, waits and turns."""

import asyncio
import gc
import threading
import weakref

import pytest
from ray import serve
from tiny_engine import make_engine

from harmonica.models.loading import load_model
from pipelines.serving import multiplexed_engines
from pipelines.serving.batching import Overloaded, TimedOut, Worker
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.loaded_engine import LoadedEngine
from pipelines.serving.multiplexed_engines import MultiplexedEngines
from pipelines.serving.requests import EngineRequest, ModelUnavailable


class Models:
    """Engines of the three, and a record of what is loaded."""

    def __init__(self, parts, most, names="abc", max_waiting=80):
        self.parts, self.loads, self.most_at_once = parts, [], 0
        self.errors, self.gate = {}, asyncio.Event()
        self.alive = weakref.WeakSet()
        self.gate.set()

        async def load(name):
            self.loads.append(name)
            await self.gate.wait()
            if name in self.errors:
                raise self.errors[name]
            model, artifact = self.parts[name]
            engine = make_engine(load_model(model), artifact, version=f"v-{name}", name=name)
            self.alive.add(engine.images)
            self.most_at_once = max(self.most_at_once, len(self.alive))
            return LoadedEngine(engine)

        multiplexed = serve.multiplexed(max_num_models_per_replica=most)(load)
        self.engines = MultiplexedEngines(tuple(names), multiplexed, max_waiting=max_waiting)

    async def ask(self, name, seed=1):
        async with self.engines.using(name) as engine:
            return await engine.generate(EngineRequest(ImageRequest(1, seed, 0), model=name))

    async def states(self):
        return {state.model: state for state in (await self.engines.describe()).states}


async def settle():
    for _ in range(20):
        await asyncio.sleep(0.001)


def test_each_draws_its_own_and_the_least_recently_used_is_unloaded(parts, replica):
    async def run():
        models = Models(parts, most=2)
        await models.engines.load_all()
        assert models.loads == ["c", "b", "a"], "the first last, so that it stays"
        assert {name: state.is_loaded for name, state in (await models.states()).items()} == {
            "a": True,
            "b": True,
            "c": False,
        }
        for name in "abab":
            image = await models.ask(name)
            alone = await make_engine(load_model(parts[name][0]), parts[name][1]).generate(
                EngineRequest(ImageRequest(1, 1, 0))
            )
            assert (image.router_version, image.picture) == (f"v-{name}", alone.picture)
        assert models.loads == ["c", "b", "a"], "nothing is loaded twice while there is room"
        await models.ask("a")
        await models.ask("c")
        states = await models.states()
        assert [name for name in "abc" if states[name].is_loaded] == ["a", "c"], "b was used before a"
        assert states["b"].card.router_version == "v-b" and states["b"].card.class_names
        gc.collect()
        assert len(models.alive) == models.most_at_once == 2

    asyncio.run(run())


def test_requests_for_two_models_and_room_for_one_share_loads(parts, replica):
    """Each load serves all that wait for it; the one before is first done with its requests, and gone."""

    async def run():
        models = Models(parts, most=1, names="ab")
        images = await asyncio.gather(*(models.ask("ab"[seed % 2], seed) for seed in range(16)))
        assert [image.router_version for image in images] == ["v-a", "v-b"] * 8
        assert models.loads == ["a", "b"]
        assert {image.batch_size for image in images} == {8}, "a batch has one model"
        assert models.most_at_once == 1

    asyncio.run(run())


def test_a_model_in_use_is_not_unloaded(parts, replica):
    async def run():
        models = Models(parts, most=1, names="ab")
        async with models.engines.using("a") as engine:
            other = asyncio.create_task(models.ask("b"))
            again = asyncio.create_task(models.ask("a"))
            await asyncio.sleep(0.2)
            assert models.loads == ["a"] and not other.done()
            await engine.generate(EngineRequest(ImageRequest(1, 1, 0)))
            del engine
        assert (await other).router_version == "v-b" and (await again).router_version == "v-a"
        assert models.loads == ["a", "b", "a"] and models.most_at_once == 1

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_leaves_the_others(parts, replica, monkeypatch, caplog):
    async def run():
        models = Models(parts, most=2)
        models.errors["b"] = ValueError("weights are damaged")
        await models.engines.load_all()
        states = await models.states()
        assert states["b"].card is None and states["b"].failure == "weights are damaged"
        with pytest.raises(ModelUnavailable) as refusal:
            await models.ask("b")
        assert 1 <= refusal.value.retry_after_s <= 30 and models.loads == ["c", "b", "a"], "not tried at once"
        assert (await models.ask("a")).router_version == "v-a"
        monkeypatch.setattr(multiplexed_engines, "_RETRY_S", 0.0)
        models.engines._failures.clear()
        with pytest.raises(ModelUnavailable):
            await models.ask("b")
        del models.errors["b"]
        assert (await models.ask("b")).router_version == "v-b"
        assert (await models.states())["b"].failure == ""

        nothing = Models(parts, most=2)
        nothing.errors = {name: ValueError(f"no {name}") for name in "abc"}
        with pytest.raises(ValueError, match="no a"):
            await nothing.engines.load_all()

    asyncio.run(run())
    assert "model b could not be loaded: weights are damaged" in caplog.text


def test_waiting_for_a_load_is_bounded_in_number_and_time(parts, replica):
    async def run():
        models = Models(parts, most=1, max_waiting=2)
        models.gate.clear()
        waiting = [asyncio.create_task(models.ask("a")) for _ in range(2)]
        await settle()
        with pytest.raises(Overloaded):
            await models.ask("a")
        with pytest.raises(TimedOut):
            async with models.engines.using("b", timeout_s=0.05):
                pass
        waiting[0].cancel()
        await settle()
        models.gate.set()
        assert (await waiting[1]).router_version == "v-a"
        await models.ask("b")
        assert models.loads[0] == "a" and (await models.ask("a")).router_version == "v-a"

    asyncio.run(run())


def test_batches_of_two_models_take_turns(parts):
    """They have one thread, and a batch is closed when that is free: not while the other's batch runs."""

    async def run():
        worker, running, overlaps, free = Worker(), [], [], threading.Event()
        engines = {}
        for name in "ab":
            engines[name] = make_engine(load_model(parts[name][0]), parts[name][1], worker=worker)
            generate = engines[name].images.generate

            def alone(*given, name=name, generate=generate):
                running.append(name)
                overlaps.append(len(running) > 1)
                free.wait(20)
                result = generate(*given)
                running.remove(name)
                return result

            engines[name].images.generate = alone

        def ask(name, seed):
            return asyncio.create_task(engines[name].generate(EngineRequest(ImageRequest(1, seed, 0))))

        tasks = [ask("a", 0), ask("b", 0)]
        await asyncio.sleep(0.1)
        tasks += [ask("b", seed) for seed in range(1, 4)]
        await asyncio.sleep(0.1)
        free.set()
        images = await asyncio.gather(*tasks)
        assert not any(overlaps)
        assert [image.batch_size for image in images] == [1, 4, 4, 4, 4], (
            "those that came meanwhile are in it"
        )

    asyncio.run(run())
