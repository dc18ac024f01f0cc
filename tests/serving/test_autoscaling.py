"""Replicas come with the images that wait, and go with them; no request fails on the way."""

import threading
from collections import Counter

import httpx
import pytest
from cluster_runs import until
from processes import free_port
from ray import serve as ray_serve
from tiny_dit import make_artifact, write_model

from pipelines.config.serve import ServeConfig
from pipelines.serving import lifecycle
from pipelines.serving.application import make_application
from pipelines.serving.serve_args import ServeArgs

CLIENTS = 12


def sampler_options(config):
    application = make_application(ServeArgs(serve=config, router="x", follow_s=1), {})
    (sampler,) = application._bound_deployment.init_args
    return sampler._bound_deployment


def test_there_is_no_more_than_one_replica_unless_asked_for():
    assert sampler_options(ServeConfig())._deployment_config.autoscaling_config is None


def test_a_replica_is_full_with_a_trajectory_and_another_waiting():
    scaling = sampler_options(ServeConfig(max_replicas=3))._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 32)
    with pytest.raises(ValueError, match=r"serve\.max_replicas is 1: give serve\.min_replicas \(2\) or more"):
        ServeConfig(min_replicas=2)


def running():
    """Sampling replicas that answer."""
    deployments = ray_serve.status().applications[lifecycle.APP_NAME].deployments
    return deployments["Sampler"].replica_states.get("RUNNING", 0)


@pytest.mark.cluster
@pytest.mark.slow
def test_one_replica_two_and_one_again(private_cluster, tmp_path, monkeypatch):
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    model = write_model(tmp_path / "model")
    router = make_artifact(model).save(tmp_path / "router")
    config = ServeConfig(
        port=free_port(),
        max_replicas=2,
        target_ongoing=4,
        upscale_delay_s=2,
        downscale_delay_s=5,
        max_batch_size=4,
        max_steps=1000,
    )
    body = {"prompt": "Bag", "seed": 1, "quality": "high", "num_inference_steps": 100}
    stop, statuses, pictures = threading.Event(), Counter(), set()

    def ask_on():
        with httpx.Client(timeout=120) as client:
            while not stop.is_set():
                answer = client.post(f"{url}/v1/images/generations", json=body)
                statuses[answer.status_code] += 1
                pictures.add(answer.json()["data"][0]["b64_json"])

    try:
        url = lifecycle.deploy(config, model, registered_model="tiny", router=str(router))
        assert running() == 1
        threads = [threading.Thread(target=ask_on) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            until("two replicas", lambda: running() == 2, 120)
            before = statuses[200]
            until("the second draws", lambda: statuses[200] > before + 4 * CLIENTS, 60)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        until("one replica again", lambda: running() == 1, 120)
        assert statuses.keys() == {200} and len(pictures) == 1
    finally:
        lifecycle.shutdown()
