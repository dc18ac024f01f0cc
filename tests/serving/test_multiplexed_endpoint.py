"""The endpoint of several models in one replica, without a cluster: answers, settings and its bound."""

import asyncio
import gc
import weakref

import pytest
from fastapi.testclient import TestClient
from images_endpoint import PATH

from harmonica.validation.settings import SettingError
from pipelines.serving.deployments import GenerationDeployment
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.images_api import create_app
from pipelines.serving.requests import EngineRequest
from pipelines.serving.router_choice import choose_routers
from pipelines.serving.serve_args import ServeArgs, read_models


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
