"""The pods of cluster/ that serve, against the code that runs in them, in the base and in each overlay."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kustomize import render

from pipelines.serving.application import stop_bound_s
from pipelines.serving.lifecycle import SERVE_ENVIRONMENT
from pipelines.serving.serve_args import ServeArgs

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.fixture(params=["base", "overlays/cpu-test", "overlays/gpu"])
def service(request: pytest.FixtureRequest) -> Any:
    """The spec of the RayService."""
    (found,) = [each for each in render(CLUSTER / request.param) if each["kind"] == "RayService"]
    return found["spec"]


def pods(service: Any) -> list[Any]:
    """The specs of its pods, the head's first."""
    cluster = service["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def environment(pod: Any) -> dict[str, str]:
    (container,) = pod["containers"]
    return {variable["name"]: variable["value"] for variable in container.get("env", ())}


def bound_s(service: Any) -> float:
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    return stop_bound_s(ServeArgs.model_validate(application["args"]).serve)


def test_a_pod_is_not_killed_before_its_requests_are_answered(service):
    assert all(pod["terminationGracePeriodSeconds"] > bound_s(service) for pod in pods(service))


def test_every_pod_s_proxy_asks_again_and_names_requests(service):
    """A connection may go to the proxy of any node."""
    assert all(environment(pod).items() >= SERVE_ENVIRONMENT.items() for pod in pods(service))
