"""Who reaches Ray's ports in a Kubernetes cluster, and which pods a drained node may take."""

from typing import Any

import pytest
from kustomize import render
from ray._private import ray_constants
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.dashboard.consts import DASHBOARD_METRIC_PORT
from ray.scripts.scripts import start
from ray.serve._private.constants import DEFAULT_GRPC_PORT, DEFAULT_HTTP_PORT

from tests.repository.test_cluster_files import BASE, CLUSTER
from tests.repository.test_kustomize import (
    COMPONENT,
    COMPONENTS,
    OVERLAYS,
    PART,
    RAY_FILES,
    by_kind,
    one,
    templates,
)

NAMESPACE = "kubernetes.io/metadata.name"
METRICS = 8080
"""KubeRay starts every node with this `--metrics-export-port`."""

Labels = dict[str, str]
Peer = tuple[str, Labels]
"""Namespace and labels of a pod."""


@pytest.fixture(params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[Any]:
    return render(CLUSTER / "overlays" / request.param)


def selects(selector: Any, labels: Labels) -> bool:
    """Whether a LabelSelector does; an empty one selects all."""
    for wanted in selector.get("matchExpressions", ()):
        assert wanted["operator"] == "In", "the only one that is used"
        if labels.get(wanted["key"]) not in wanted["values"]:
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def admits(policies: list[Any], pod: Labels, port: int, source: Peer) -> bool:
    """Whether a connection to a pod in namespace `default` is let in, as Kubernetes defines it."""
    namespace, labels = source
    chosen = [policy["spec"] for policy in policies if selects(policy["spec"]["podSelector"], pod)]
    chosen = [spec for spec in chosen if "Ingress" in spec["policyTypes"]]
    if not chosen:
        return True  # nothing is closed where no policy is
    for rule in (rule for spec in chosen for rule in spec.get("ingress", ())):
        if "ports" in rule and port not in [each["port"] for each in rule["ports"]]:
            continue
        if "from" not in rule:
            return True
        for peer in rule["from"]:
            if "namespaceSelector" in peer:
                here = selects(peer["namespaceSelector"], {NAMESPACE: namespace})
            else:
                here = namespace == "default"
            if here and selects(peer.get("podSelector", {}), labels):
                return True
    return False


def rays_ports(documents: list[Any]) -> dict[str, int]:
    """Every port that the manifests name, that `ray start` takes by default, and that Serve listens on."""
    ports = {
        f"{kind} {port['name']}": port["containerPort"]
        for kind in RAY_FILES
        for template in templates(one(documents, kind)).values()
        for container in template["spec"]["containers"]
        for port in container.get("ports", ())
    }
    for parameter in start.params:
        if "port" in parameter.name and isinstance(parameter.default, int) and parameter.default:
            ports[parameter.name] = parameter.default
    ports |= {
        "gcs": ray_constants.DEFAULT_PORT,
        "agent": ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT,
        "autoscaler metrics": AUTOSCALER_METRIC_PORT,
        "dashboard metrics": DASHBOARD_METRIC_PORT,
        "metrics": METRICS,
        "serve": DEFAULT_HTTP_PORT,
        "serve gRPC": DEFAULT_GRPC_PORT,
        "any other": 45678,
    }
    return ports


OPERATOR: Peer = ("kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"})
INGRESS: Peer = ("ingress-nginx", {"app.kubernetes.io/name": "ingress-nginx"})
SUBMITTER: Peer = ("default", {"batch.kubernetes.io/job-name": "harmonica-fashion"})
OPENED: list[tuple[Peer, dict[str, set[int]]]] = [
    (OPERATOR, {component: {8265, 8000} for component in COMPONENTS.values()}),
    (INGRESS, {"cluster": {8000}, "serving": {8000}}),
    (SUBMITTER, {"training": {8265}}),
    (("default", {}), {}),
    (("elsewhere", {PART: "harmonica", COMPONENT: "serving"}), {}),
    (("default", INGRESS[1]), {}),
    (("default", OPERATOR[1]), {}),
    (("ingress-nginx", {}), {}),
]
"""Who connects, and the ports that are open to it of each component."""


def test_every_port_of_ray_is_closed_to_all_but_its_own_cluster(rendered: list[Any]):
    policies, ports = by_kind(rendered, "NetworkPolicy"), rays_ports(rendered)
    assert {6379, 8265, 10001, 10002, 19999, 52365, 8000, 9000, 8080} <= set(ports.values())
    for component in COMPONENTS.values():
        pod = {PART: "harmonica", COMPONENT: component}
        for name, port in ports.items():
            for other in COMPONENTS.values():
                peer = ("default", {PART: "harmonica", COMPONENT: other})
                assert admits(policies, pod, port, peer) == (component == other), (component, name, other)
            for source, opened in OPENED:
                expected = port in opened.get(component, set())
                assert admits(policies, pod, port, source) == expected, (component, name, source)


def test_prometheus_reaches_the_metrics_and_nothing_else():
    documents = render(BASE) + render(CLUSTER / "monitoring")
    policies, ports = by_kind(documents, "NetworkPolicy"), rays_ports(documents)
    monitor = one(documents, "PodMonitor")["spec"]
    assert monitor.keys() == {"selector", "podMetricsEndpoints"}
    assert monitor["podMetricsEndpoints"] == [{"port": "metrics", "path": "/metrics", "interval": "10s"}]
    for component in COMPONENTS.values():
        pod = {PART: "harmonica", COMPONENT: component}
        assert selects(monitor["selector"], pod)
        for port in ports.values():
            for namespace in ("monitoring", "default"):
                source = (namespace, {"app.kubernetes.io/name": "prometheus"})
                expected = (namespace, port) == ("monitoring", METRICS)
                assert admits(policies, pod, port, source) == expected, (component, port)


def test_the_submitter_is_the_job_s():
    assert SUBMITTER[1]["batch.kubernetes.io/job-name"] == one(render(BASE), "RayJob")["metadata"]["name"]


def test_budgets_keep_every_head_and_a_worker_that_serves(rendered: list[Any]):
    kept = {}
    for component in COMPONENTS.values():
        for role in ("head", "worker"):
            pod = {PART: "harmonica", COMPONENT: component, "ray.io/node-type": role}
            budgets = by_kind(rendered, "PodDisruptionBudget")
            found = [each["spec"] for each in budgets if selects(each["spec"]["selector"], pod)]
            assert len(found) <= 1, "Kubernetes evicts no pod that has two"
            kept[component, role] = found[0]["minAvailable"] if found else 0
    heads = {(component, "head"): 1 for component in COMPONENTS.values()}
    workers = {("cluster", "worker"): 0, ("training", "worker"): 0, ("serving", "worker"): 1}
    assert kept == heads | workers
