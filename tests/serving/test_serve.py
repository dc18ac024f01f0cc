"""The endpoint on Ray Serve: one real deployment in a private cluster, asked by OpenAI's own client."""

import base64
import dataclasses
import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import ray
from PIL import Image
from tiny_dit import SHAPE, make_artifact, write_model

from pipelines.config.serve import ServeConfig
from pipelines.serving import lifecycle
from pipelines.serving.client import first_image
from pipelines.tracking import registry
from pipelines.tracking.mlflow_runs import find_or_create
from tests.repository.test_ray_up_and_monitoring import dashboard_metrics

NAME = "tiny"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def model(folders):
    return write_model(folders / "model")


def register(folders, model, run_id, seed):
    """MLflow's URI, after a router with this seed has become the champion."""
    run = find_or_create("register", run_id, str(folders), {})
    folder = make_artifact(model, seed=seed).save(folders / run_id)
    registry.register(folder, name=NAME, run=run)
    return run.uri


@pytest.fixture(scope="module")
def config():
    # The long wait is for this machine: requests that come together must meet however busy it is.
    settings = {"max_batch_size": 8, "batch_wait_s": 0.3, "max_images_per_request": 4, "max_steps": 1000}
    return ServeConfig(port=free_port(), **settings)


@pytest.fixture(scope="module")
def url(folders, model, config, private_cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = register(folders, model, "first", seed=1)
        yield lifecycle.deploy(config, model, registered_model=NAME, tracking_uri=uri, follow_s=1)
        lifecycle.shutdown()


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(api_key="unused", base_url=f"{url}/v1", max_retries=0) as client:
        yield client


def pixels(b64_json):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json)))).astype(int)


def pictures(answer):
    return [pixels(image.b64_json) for image in answer.data]


def replica_of(deployment):
    """Name and namespace of its one replica."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return next(actor for actor in actors if f"harmonica#{deployment}#" in actor["name"])


def sampler_actor():
    """That which draws."""
    return replica_of("Sampler")


def same(first, second):
    """Kernels may sum in another order for another batch size, which can tip a rounded grey level."""
    return np.abs(first - second).max() <= 1


@pytest.mark.cluster
def test_an_image_is_its_seeds_alone_or_in_company(client):
    alone = client.images.generate(prompt="sneaker", extra_body={"seed": 7})
    assert alone.batch_size == 1 and alone.seed == 7 and alone.router_version == "1"
    (image,) = pictures(alone)
    assert image.shape == (28, 28) and image.std() > 0

    three = client.images.generate(prompt="7", n=3, extra_body={"seed": 7})
    assert three.batch_size == 3
    assert same(pictures(three)[0], image)
    assert not same(pictures(three)[1], image)

    def ask(seed):
        return client.images.generate(prompt="Sneaker", extra_body={"seed": seed})

    with ThreadPoolExecutor(8) as threads:
        company = list(threads.map(ask, range(8)))
    assert max(answer.batch_size for answer in company) > 1
    assert same(pictures(company[7])[0], image)
    assert not any(same(pictures(answer)[0], image) for answer in company[:7])


@pytest.mark.cluster
def test_qualities_and_previews_reach_the_client(client):
    asked = {"prompt": "sneaker", "output_format": "webp", "extra_body": {"seed": 7}}
    whole = client.images.generate(**asked, quality="high")
    assert (whole.router_version, whole.cur, whole.quality) == ("uncached", 0, "high")
    *previews, completed = client.images.generate(**asked, quality="high", stream=True, partial_images=3)
    assert [event.partial_image_index for event in previews] == [0, 1, 2]
    assert same(pixels(completed.b64_json), pictures(whole)[0])
    with pytest.raises(openai.BadRequestError, match="router 1 of quality medium was made for 8"):
        client.images.generate(prompt="bag", stream=True, extra_body={"num_inference_steps": 9})


@pytest.mark.cluster
def test_a_client_that_has_gone_is_not_drawn_for(client, url):
    endpoint, medium = f"{url}/v1/images/generations", {"prompt": "Bag", "seed": 1}
    long = {"prompt": "Bag", "n": 4, "quality": "high", "num_inference_steps": 1000}
    for gone in (medium, medium | {"stream": True}):
        with ThreadPoolExecutor(2) as threads:
            first = threads.submit(httpx.post, endpoint, json=long, timeout=120)
            time.sleep(0.6)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(endpoint, json=gone, timeout=0.3)
            stayed = threads.submit(httpx.post, endpoint, json=medium, timeout=120)
            time.sleep(0.3)
            assert not first.done(), "else nobody had to wait"
            assert stayed.result().json()["batch_size"] == 1
            assert first.result().json()["batch_size"] == 4
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    assert not [log for log in logs.glob("*.log") if "Traceback" in log.read_text()], (
        "a line a client at most"
    )


@pytest.mark.cluster
def test_refusals_reach_the_client(client, url):
    with pytest.raises(openai.BadRequestError, match="give a class name") as refusal:
        client.images.generate(prompt="cat")
    assert (refusal.value.param, refusal.value.code) == ("prompt", "unknown_class")
    with pytest.raises(openai.BadRequestError, match="n is 5: give 1 to 4"):
        client.images.generate(prompt="0", n=5)
    with pytest.raises(openai.NotFoundError, match="serves 'tiny'"):
        client.images.generate(prompt="0", model="dall-e-3")
    answer = httpx.post(f"{url}/v1/images/generations", content=b"x" * 70_000)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.cluster
def test_health_models_and_documentation(client, url):
    health = httpx.get(f"{url}/healthz").json()
    assert (health["status"], health["model"], health["router_version"]) == ("ok", NAME, "1")
    assert [entry.id for entry in client.models.list()] == [NAME]
    assert httpx.get(f"{url}/docs").status_code == 200


@pytest.mark.cluster
def test_more_than_can_wait_is_turned_away_and_the_rest_is_drawn(url):
    # Long ones: a busy machine asks for them as slowly as it draws short ones.
    long = {"quality": "high", "num_inference_steps": 50}

    def ask(seed):
        body = {"prompt": "0", "seed": seed, "n": 4, **long}
        return httpx.post(f"{url}/v1/images/generations", json=body, timeout=120)

    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(ask, range(40)))
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "overloaded"
            assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.cluster
def test_a_lost_replica_costs_no_request(url):
    before = first_image(url, "Bag", seed=3)
    lost = sampler_actor()
    handle = ray.get_actor(**lost)
    asked_until = time.monotonic() + 3

    def ask_on():  # first_image raises on a 500
        answers = [first_image(url, "Bag", seed=3)]
        while time.monotonic() < asked_until:
            answers.append(first_image(url, "Bag", seed=3))
        return answers

    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask_on) for _ in range(4)]
        time.sleep(1.5)
        ray.kill(handle)
        answers = [answer for future in asked for answer in future.result()]
    assert sampler_actor()["name"] != lost["name"]
    expected = pixels(before["data"][0]["b64_json"])
    assert all(same(pixels(answer["data"][0]["b64_json"]), expected) for answer in answers)


@pytest.mark.cluster
def test_a_lost_ingress_replica_costs_no_request(url):
    lost = replica_of("Api")
    asked_until = time.monotonic() + 3

    def ask_on():  # first_image raises on a 500
        while time.monotonic() < asked_until:
            first_image(url, "Bag", seed=3)

    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(ask_on) for _ in range(4)]
        time.sleep(0.5)
        ray.kill(ray.get_actor(**lost))
        for future in asked:
            future.result()
    assert replica_of("Api")["name"] != lost["name"]


@pytest.mark.cluster
def test_requests_have_names(url):
    given = httpx.get(f"{url}/livez", headers={"X-Request-Id": "mine-7"})
    assert given.headers.get_list("x-request-id") == ["mine-7"]
    assert len(httpx.get(f"{url}/livez").headers["x-request-id"]) > 8
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}


@pytest.mark.cluster
def test_prometheus_reads_what_goes_on(url):
    """Every number that the dashboard shows, under the name that it asks for."""
    first_image(url, "Bag", seed=3)
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {name for name in dashboard_metrics() if "refused" not in name}  # those count from the first
    deadline, missing = time.monotonic() + 60, wanted
    while missing and time.monotonic() < deadline:
        time.sleep(1)
        said = httpx.get(address).text
        missing = {name for name in wanted if f"\n{name}{{" not in said}
    assert not missing
    images = [line for line in said.splitlines() if line.startswith("ray_harmonica_images_total{")]
    assert any('router_version="1"' in line for line in images)


@pytest.mark.cluster
def test_the_champion_is_followed(folders, model, url):
    """On the replicas that run, with nothing deployed again."""
    before = sampler_actor()
    register(folders, model, "second", seed=2)
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/healthz").json()["router_version"] != "2" and time.monotonic() < deadline:
        time.sleep(0.2)
    assert first_image(url, "Bag", seed=3)["router_version"] == "2"
    assert sampler_actor() == before


@pytest.mark.cluster
def test_a_model_that_does_not_fit_the_router_is_refused_at_start(folders, config, url):
    """The last test on the deployment, since it breaks it."""
    other = write_model(folders / "other", shape=dataclasses.replace(SHAPE, num_layers=2))
    with pytest.raises(RuntimeError, match="num_layers is 2 and the router was made for 3"):
        lifecycle.deploy(config, other, registered_model=NAME, router=str(folders / "first"))
