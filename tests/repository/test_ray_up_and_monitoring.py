"""The files of `ray up` against its schema, and those that Prometheus and Grafana read."""

import copy
import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft7Validator
from ray._private import ray_constants

import harmonica
from tests.repository.test_cluster_files import CLUSTER, ROOT, errors, load


def ray_up_validator() -> Draft7Validator:
    import ray.autoscaler

    schema_path = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    return Draft7Validator(json.loads(schema_path.read_text()))


RAY_UP_FILES = ["ray-up.yaml", "ray-up-aws.yaml"]


@pytest.mark.parametrize("file", RAY_UP_FILES)
def test_ray_up_file_is_what_ray_up_reads(file: str):
    document = load(file, CLUSTER)
    assert errors(ray_up_validator(), document) == []
    for role in ("head", "worker"):
        *_, started = document[f"{role}_start_ray_commands"]
        assert "ray start --" in started and "RAY_AUTH_MODE=token " in started
        assert "--dashboard-host" not in started, "the dashboard stays on loopback"
    assert document["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


def test_a_spoilt_ray_up_file_is_found():
    document = load("ray-up.yaml", CLUSTER)
    document["worker_nodes"] = {}
    document["provider"].pop("type")
    found = " ".join(errors(ray_up_validator(), document))
    assert "worker_nodes" in found and "'type'" in found


def test_ray_fills_up_the_file_for_aws():
    """What `ray up` does before it asks Amazon for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = load("ray-up-aws.yaml", CLUSTER)
    filled = prepare_config(copy.deepcopy(given))
    validate_config(filled)
    types = filled["available_node_types"]
    assert types.keys() == {"head", "cpu-worker", "gpu-worker"}, "and not Ray's own"
    assert sum(each.get("max_workers", 0) for each in types.values()) <= filled["max_workers"]
    assert types["head"]["max_workers"] == 0
    images = [filled["docker"]["head_image"], filled["docker"]["worker_image"]]
    images += [types["gpu-worker"]["docker"]["worker_image"]]
    image = f"registry.example.com/harmonica-ray:{harmonica.__version__}"
    assert images == [image, image, f"{image}-gpu"]
    for commands in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert filled[commands] == [], "all is in the image"
    assert "security_group" not in given["provider"], "Ray's opens SSH alone"


def dashboard_metrics() -> set[str]:
    """Names of our own that cluster/grafana.json asks Prometheus for."""
    text = (CLUSTER / "grafana.json").read_text()
    return set(re.findall(r"ray_harmonica_[a-z_]+", text))


def test_the_dashboard_shows_every_metric_of_serving_and_no_other():
    source = (ROOT / "pipelines" / "serving" / "metrics.py").read_text()
    kinds = re.findall(r'(Counter|Gauge|Histogram)\(\s*"(harmonica_[a-z_]+)"', source)
    assert len(kinds) == 9
    suffix = {"Counter": "_total", "Gauge": "", "Histogram": ""}
    expected = {f"ray_{name}{suffix[kind]}" for kind, name in kinds}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in dashboard_metrics()}
    assert shown == expected


def test_the_dashboard_is_one_that_grafana_reads():
    document = json.loads((CLUSTER / "grafana.json").read_text())
    assert document["title"] and document["schemaVersion"] >= 36
    places = [tuple(panel["gridPos"][name] for name in "xywh") for panel in document["panels"]]
    assert all(x + w <= 24 for x, _, w, _ in places) and len(set(places)) == len(places)
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in document["panels"]:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["expr"] for target in panel["targets"])


def test_prometheus_finds_the_nodes_where_ray_writes_them():
    document = load("prometheus.yml", CLUSTER)
    assert document.keys() == {"global", "scrape_configs"}
    (job,) = document["scrape_configs"]
    assert job == {
        "job_name": "ray",
        "file_sd_configs": [{"files": [f"/tmp/ray/{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}],
    }, "and under /metrics, as is the default"
