"""Several models behind one endpoint on Ray Serve: of two kinds, with more of them than a replica may hold.

Every picture is checked: it is what the sampler of its own model draws in this process.
"""

import base64
import io
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
import ray
from cluster_runs import until
from PIL import Image
from processes import free_port
from tiny_dit import make_artifact, write_model

from harmonica.core.golden_sample import record_sample
from harmonica.evaluation.plots import encode_picture
from harmonica.models.loading import BUILTIN_TEXT, ModelConfig, load_model
from harmonica.samplers import make_sampler
from pipelines.serving import lifecycle
from pipelines.serving.image_request import ImageRequest
from pipelines.serving.image_sampler import ImageSampler
from pipelines.serving.serve_args import ServeArgs
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
SEEDS = range(3)
PROMPTS = {"dit": "Bag", "pixart": "a photo of a bag"}
PATH = "/v1/images/generations"


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture))).astype(int)


def same(first, second):
    """Kernels may sum in another order for another batch size, which can tip a rounded grey level."""
    return first.shape == second.shape and np.abs(first - second).max() <= 1


class Site:
    """The models, their registry, and what each draws."""

    def __init__(self, folder):
        self.folder, self.expected = folder, {}
        self.model, self.other = write_model(folder / "dit"), write_model(folder / "other", seed=5)
        self.dit = ImageSampler(load_model(self.model))
        pixart = ImageSampler(load_model(ModelConfig(path=BUILTIN_TEXT)))
        self._draw("pixart", pixart, pixart.make_uncached(pixart.own_sampler(BUILTIN_TEXT)))

    def register(self, seed):
        """A router with this seed, as the champion of `dit`; its version."""
        artifact = make_artifact(self.model, seed=seed)
        artifact = record_sample(artifact, make_sampler(self.dit.model, artifact.sampler))
        run = find_or_create("register", f"run-{seed}", str(self.folder), {})
        self.uri = run.uri
        made = self.dit.make_plan(artifact, str(seed))
        self._draw("dit", self.dit, made)  # before it can be served
        version = registry.register(artifact.save(self.folder / f"router-{seed}"), name="dit", run=run)
        assert version == made.version
        return version

    def _draw(self, name, images, served):
        subject = 8 if images.class_names else PROMPTS[name]
        images.use(served)
        for seed in SEEDS:
            picture = encode_picture(images.generate([ImageRequest(subject, seed, 0)])[0])
            self.expected[name, served.version, seed] = pixels(picture)

    def args(self, **settings):
        models = {
            "dit": {"model": {"path": self.model.path}},
            "pixart": {"model": {"path": BUILTIN_TEXT}, "router": "uncached"},
            # A router of other weights: it can be found, and does not fit.
            "broken": {"model": {"path": self.other.path}, "router": str(self.folder / "router-1")},
        }
        serve = {"port": self.port, "max_batch_size": 8, "batch_wait_s": 0.01} | settings
        return ServeArgs.model_validate(
            {"models": models, "serve": serve, "tracking_uri": self.uri, "follow_s": 1}
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory, private_cluster):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        site = Site(tmp_path_factory.mktemp("models"))
        site.register(1)
        site.port = free_port()
        yield site
        lifecycle.shutdown()


class Load:
    """Clients that ask for both models in turn, and check what they get."""

    def __init__(self, site, url, clients=4):
        self._site, self._url, self._stop = site, url, threading.Event()
        self.statuses, self.versions, self.wrong = Counter(), Counter(), []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number):
        with httpx.Client(base_url=self._url, timeout=90) as client:
            while not self._stop.is_set():
                number += 1
                name, seed = ("dit", "pixart")[number % 2], number // 2 % len(SEEDS)
                try:
                    answer = client.post(PATH, json={"model": name, "prompt": PROMPTS[name], "seed": seed})
                except httpx.HTTPError as error:
                    self.statuses[repr(error)] += 1
                    continue
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    self._check(name, seed, answer.json())

    def _check(self, name, seed, body):
        version, picture = body["router_version"], base64.b64decode(body["data"][0]["b64_json"])
        self.versions[name, version] += 1
        if not same(pixels(picture), self._site.expected[name, version, seed]):
            self.wrong.append((name, version, seed))


def health(url):
    return {each["model"]: each for each in httpx.get(f"{url}/healthz", timeout=30).json()["models"]}


def swap_under_load(site, url, seed):
    with Load(site, url) as load:
        both = [("dit", str(seed - 1)), ("pixart", "uncached")]
        until("both models draw", lambda: all(load.versions[each] > 5 for each in both), 60)
        assert site.register(seed) == str(seed)
        until("the new champion draws", lambda: load.versions["dit", str(seed)] > 5, 60)
        before = load.versions["pixart", "uncached"]
        until("the other goes on", lambda: load.versions["pixart", "uncached"] > before + 2, 60)
    assert load.statuses.keys() == {200} and load.wrong == []


def test_two_kinds_with_room_for_one(site):
    url = lifecycle.deploy_args(site.args(max_models_per_replica=1))
    with openai.OpenAI(api_key="unused", base_url=f"{url}/v1", max_retries=0) as client:
        assert [entry.id for entry in client.models.list()] == ["dit", "pixart", "broken"]
        assert client.models.retrieve("pixart").class_names == []
        with pytest.raises(openai.NotFoundError, match="serves 'dit', 'pixart' and 'broken'"):
            client.images.generate(prompt="Bag", model="dall-e-3")
        for name in ("dit", "pixart", "dit"):
            asked = {"model": name, "prompt": PROMPTS[name], "extra_body": {"seed": 1}}
            answer = client.images.generate(**asked)
            drawn = pixels(base64.b64decode(answer.data[0].b64_json))
            assert same(drawn, site.expected[name, answer.router_version, 1])
            statuses = {model: each["status"] for model, each in health(url).items()}
            other = "pixart" if name == "dit" else "dit"
            assert statuses == {name: "loaded", other: "unloaded", "broken": "failed"}
            *_, streamed = client.images.generate(**asked, stream=True, partial_images=2)
            assert same(pixels(base64.b64decode(streamed.b64_json)), drawn)
        with pytest.raises(openai.InternalServerError, match="'broken' could not be loaded") as refusal:
            client.images.generate(prompt="Bag", model="broken")
        assert refusal.value.status_code == 503 and refusal.value.code == "model_unavailable"
    assert health(url)["broken"]["error"]
    assert httpx.get(f"{url}/readyz").status_code == 200
    swap_under_load(site, url, 2)


def test_all_loaded_on_two_replicas(site):
    url = lifecycle.deploy_args(site.args(min_replicas=2, max_replicas=2, num_cpus=0.5))
    with ThreadPoolExecutor(8) as threads:
        body = {"model": "pixart", "prompt": PROMPTS["pixart"], "n": 2, "seed": 0}
        ask = lambda _: httpx.post(url + PATH, json=body, timeout=90).status_code  # noqa: E731
        assert set(threads.map(ask, range(8))) == {200}
    assert [each["status"] for each in health(url).values()] == ["loaded", "loaded", "failed"]
    swap_under_load(site, url, 3)
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def labels():
        said = httpx.get(address).text.splitlines()
        images = [line for line in said if line.startswith("ray_harmonica_images_total{")]
        return [name for name in ("dit", "pixart") if any(f'model="{name}"' in line for line in images)]

    until("metrics name the models", lambda: labels() == ["dit", "pixart"], 60)
