"""Several models in one replica: Ray's own multiplexing, and what is around it, without a cluster."""

import asyncio
import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient
from ray import serve
from ray.serve import context, multiplex
from ray.serve._private.common import DeploymentID, ReplicaID
from tiny_dit import make_artifact, write_model
from tiny_engine import make_engine

from harmonica.models.loading import load_model
from harmonica.validation.settings import SettingError
from pipelines.serving import multiplexed_engines
from pipelines.serving.batching import Overloaded, TimedOut, Worker
from pipelines.serving.deployments import GenerationDeployment
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.images_api import create_app
from pipelines.serving.loaded_engine import LoadedEngine
from pipelines.serving.multiplexed_engines import MultiplexedEngines
from pipelines.serving.requests import EngineRequest, ModelUnavailable
from pipelines.serving.router_choice import choose_routers
from pipelines.serving.serve_args import ServeArgs, read_models

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Model and router of each name."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for number, name in enumerate("abc"):
        model = write_model(folder / name, seed=number)
        made[name] = (model, make_artifact(model, seed=number))
        made[name][1].save(folder / f"router-{name}")
    return made


@pytest.fixture
def replica(monkeypatch):
    """What Serve's multiplexing asks of the process that it runs in."""
    name = DeploymentID(name="Sampler", app_name="test")
    replica = context.ReplicaContext(
        replica_id=ReplicaID(unique_id="x", deployment_id=name),
        servable_object=None,
        _deployment_config=None,
        rank=None,
        world_size=1,
    )
    monkeypatch.setattr(context, "_INTERNAL_REPLICA_CONTEXT", replica)
    # What is told to Serve's controller: the names of the models that are loaded.
    controller = SimpleNamespace(record_request_routing_info=lambda info: None)
    monkeypatch.setattr(multiplex, "_get_global_client", lambda: controller)


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


@pytest.fixture
def deployment_args(parts, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    models = {
        name: {"model": {"path": model.path}, "router": str(artifact.save(tmp_path / f"router-{name}"))}
        for name, (model, artifact) in parts.items()
    }
    return {"models": models, "serve": {"max_models_per_replica": 1, "max_batch_size": 4, "lenient": False}}


class Local:
    """The image source of a deployment in this process."""

    def __init__(self, args):
        self._args, self._made = ServeArgs.model_validate(args), None

    async def _deployment(self):
        if self._made is None:
            self._made = GenerationDeployment.__new__(GenerationDeployment)
            await self._made.__init__(self._args)
        return self._made

    async def describe(self, model=""):
        return self._checked(await (await self._deployment()).describe(model))

    async def generate(self, request):
        return self._checked(await (await self._deployment()).generate(request))

    async def generate_stream(self, request):
        async for event in (await self._deployment()).generate_stream(request):
            yield self._checked(event)

    @staticmethod
    def _checked(answer):
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_endpoint_of_several_models(deployment_args, replica):
    source = Local(deployment_args)
    with TestClient(create_app(source), raise_server_exceptions=False) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [entry["id"] for entry in listed] == ["a", "b", "c"]
        assert listed[1]["class_names"] and listed[1]["object"] == "model"
        assert client.get("/v1/models/b").json() == listed[1]
        missing = client.get("/v1/models/d")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
        assert missing.json()["error"]["message"] == "model is 'd': this endpoint serves 'a', 'b' and 'c'"

        def ask(**body):
            return client.post(PATH, json={"prompt": "Bag", "seed": 3} | body)

        pictures = {}
        for name in ("a", "b", "c", None, "b"):
            answer = ask(model=name)
            assert answer.status_code == 200 and answer.json()["router_version"] == f"router-{name or 'a'}"
            pictures.setdefault(name or "a", answer.json()["data"][0]["b64_json"])
            assert answer.json()["data"][0]["b64_json"] == pictures[name or "a"]
        assert len(set(pictures.values())) == 3
        streamed = ask(model="c", stream=True)
        assert '"router_version":"router-c"' in streamed.text.replace(" ", "")
        unknown = ask(model="d")
        assert unknown.status_code == 404
        assert unknown.json()["error"] == {
            "message": "model is 'd': this endpoint serves 'a', 'b' and 'c', "
            "give one of those or leave it out",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        health = client.get("/healthz").json()
        assert (health["status"], health["model"]) == ("ok", "a")
        assert [each["status"] for each in health["models"]] == ["unloaded", "unloaded", "loaded"]
        assert client.get("/readyz").status_code == 200
        routers = client.get("/v1/routers", params={"model": "b"}).json()["data"]
        assert "router-b" in [router["id"] for router in routers]
        assert "router-a" in [router["id"] for router in client.get("/v1/routers").json()["data"]]
        assert client.get("/v1/routers", params={"model": "d"}).status_code == 404


def test_a_lenient_endpoint_of_several_warns(deployment_args, replica):
    with TestClient(create_app(Local(deployment_args), lenient=True)) as client:
        answer = client.post(PATH, json={"prompt": "Bag", "model": "dall-e-3"}).json()
    assert answer["router_version"] == "router-a"
    assert [each["message"] for each in answer["warnings"]] == [
        "model is 'dall-e-3': this endpoint serves 'a', 'b' and 'c', and 'a' has generated the images"
    ]


def test_a_model_that_is_broken_is_answered_503_and_the_others_200(deployment_args, replica, monkeypatch):
    broken = deployment_args["models"]["b"]
    deployment_args["models"]["b"] = broken | {"router": deployment_args["models"]["a"]["router"]}
    # Of another seed's weights: the router's fingerprint does not fit.
    with TestClient(create_app(Local(deployment_args)), raise_server_exceptions=False) as client:
        entry = client.get("/v1/models/b").json()
        assert entry["id"] == "b" and entry["error"] and "size" not in entry
        answer = client.post(PATH, json={"prompt": "Bag", "model": "b"})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        error = answer.json()["error"]
        assert (error["code"], error["param"], error["type"]) == (
            "model_unavailable",
            "model",
            "server_error",
        )
        assert error["message"].startswith("model 'b' could not be loaded: ask for another one")
        for name in ("a", "c"):
            assert client.post(PATH, json={"prompt": "Bag", "model": name}).status_code == 200
        health = {each["model"]: each for each in client.get("/healthz").json()["models"]}
        assert health["b"]["status"] == "failed" and health["b"]["error"] == entry["error"]
        assert client.get("/readyz").status_code == 200


def test_settings_of_several_models_name_what_is_wrong(tmp_path):
    refused = {
        "models.a.model.dtype is 'x': give one of float32": {"models": {"a": {"model": {"dtype": "x"}}}},
        "models.a.rooter is 'x': there is no such setting": {"models": {"a": {"rooter": "x"}}},
        "models is 5: give the settings of each model by its name": {"models": 5},
        "models is ' a': give names of 1 to 100": {"models": {" a": {}}},
        "router is 'x': leave it out where models are given": {"models": {"a": {}}, "router": "x"},
    }
    for words, given in refused.items():
        with pytest.raises(SettingError, match=words) as caught:
            ServeArgs.model_validate(given)
        assert "\n" not in str(caught.value)
    for text in ("", "[1]", "a: [", "\x00"):
        (tmp_path / "models.yaml").write_text(text)
        with pytest.raises(ValueError, match="give a YAML file that has"):
            read_models(str(tmp_path / "models.yaml"))
    with pytest.raises(ValueError, match="which cannot be read"):
        read_models(str(tmp_path / "none.yaml"))
    (tmp_path / "models.yaml").write_text(
        "a: {model: {path: x}, registered_model: y}\nb: {router: uncached}\n"
    )
    by_name = ServeArgs(models=read_models(str(tmp_path / "models.yaml")), tracking_uri="http://m").by_name()
    settings = {
        name: (each.registered_model, each.tracking_uri, each.router) for name, each in by_name.items()
    }
    assert settings == {"a": ("y", "http://m", ""), "b": ("b", "", "uncached")}


def test_the_router_of_each_model_is_chosen_before_serving(parts, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    router = str(parts["a"][1].save(tmp_path / "router"))
    models = {"dit": {}, "a": {"model": {"path": parts["a"][0].path}, "router": router}}
    args, summary = choose_routers(ServeArgs.model_validate({"models": models}), str(tmp_path))
    assert args.by_name()["dit"].current_version() == "builtin"
    assert args.by_name()["a"].current_version() == "router"
    assert summary == f"dit: the built-in champion (no MLflow store yet); a: the router in {router}"
    wrong = ServeArgs.model_validate(
        {"models": models | {"b": models["a"] | {"model": {"path": parts["b"][0].path}}}}
    )
    with pytest.raises(ValueError, match=r"models\.b: router is .* does not fit"):
        choose_routers(wrong, str(tmp_path))


def test_the_bound_of_a_deployment_holds(deployment_args, replica):
    def samplers():
        return weakref.WeakSet(each for each in gc.get_objects() if isinstance(each, ImageSampler))

    before = samplers()

    async def run():
        deployment = GenerationDeployment.__new__(GenerationDeployment)
        await deployment.__init__(ServeArgs.model_validate(deployment_args))
        for name in "abcab":
            answer = await deployment.generate(EngineRequest(ImageRequest(1, 1, 0), model=name))
            assert answer.router_version == f"router-{name}"
            gc.collect()
            assert len(samplers() - before) == 1
        catalog = await deployment.describe()
        assert [state.is_loaded for state in catalog.states] == [False, True, False]

    asyncio.run(run())
