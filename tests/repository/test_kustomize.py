"""The overlays of cluster/, rendered and read by the schemas of Kubernetes and by our own parsers."""

import re
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from kustomize import apply, render

from harmonica.cli.common import parse
from pipelines.config.workflow import WorkflowConfig
from pipelines.presets import PRESETS
from pipelines.serving.serve_args import ServeArgs
from tests.repository.test_cluster_files import (
    BASE,
    CLUSTER,
    KUBERAY_FILES,
    RAY_CLUSTER_SPEC,
    at,
    crd_schema,
    crd_validator,
    errors,
    serve_errors,
)

OVERLAYS = ["cpu-test", "gpu"]
RAY_FILES = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml", "RayService": "rayservice.yaml"}
COMPONENTS = {"RayCluster": "cluster", "RayJob": "training", "RayService": "serving"}
PART, COMPONENT = "app.kubernetes.io/part-of", "app.kubernetes.io/component"


def by_kind(documents: list[Any], kind: str) -> list[Any]:
    return [document for document in documents if document["kind"] == kind]


def one(documents: list[Any], kind: str) -> Any:
    (found,) = by_kind(documents, kind)
    return found


def cluster_spec(document: Any) -> Any:
    return at(document, *RAY_CLUSTER_SPEC[RAY_FILES[document["kind"]]])


def templates(document: Any) -> dict[str, Any]:
    """Pod templates of the head and the worker groups."""
    spec = cluster_spec(document)
    groups = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **groups}


def strict(schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A document of a core kind: its `spec` and nothing beside."""
    top = {"apiVersion": {}, "kind": {}, "metadata": {"type": "object", "required": ["name"]}}
    return {
        "type": "object",
        "properties": top | fields | {"spec": schema},
        "required": ["apiVersion", "kind", "metadata"],
        "additionalProperties": False,
    }


def core_schemas() -> dict[str, Any]:
    """Selectors and ingress rules as the CRD, which embeds them, has them; the few fields around by hand."""
    rules = at(
        crd_schema("raycluster.yaml"), "properties", "spec", "properties", "networkPolicy", "properties"
    )
    ingress = at(rules, "head", "properties", "ingressRules")
    peer = at(ingress, "items", "properties", "from", "items", "properties")
    policy = {
        "podSelector": peer["podSelector"],
        "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
        "ingress": ingress,
    }
    # An integer, and no maxUnavailable: owners without a scale subresource allow nothing else.
    budget = {"minAvailable": {"type": "integer"}, "selector": peer["podSelector"]}
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    shape = {"type": "object", "additionalProperties": False}
    return {
        "NetworkPolicy": strict(shape | {"properties": policy, "required": ["podSelector"]}),
        "PodDisruptionBudget": strict(shape | {"properties": budget, "required": list(budget)}),
        "ConfigMap": strict({"not": {}}, data=texts),
    }


VERSIONS = {
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "ConfigMap": "v1",
} | dict.fromkeys(RAY_FILES, "ray.io/v1")


@pytest.fixture(params=OVERLAYS)
def rendered(request: pytest.FixtureRequest) -> list[Any]:
    return render(CLUSTER / "overlays" / request.param)


def test_rendered_documents_are_what_kubernetes_reads(rendered: list[Any]):
    schemas = core_schemas()
    names = [(document["kind"], document["metadata"]["name"]) for document in rendered]
    assert len(set(names)) == len(names)
    assert {kind for kind, _ in names} == VERSIONS.keys()
    for document in rendered:
        kind = document["kind"]
        assert document["apiVersion"] == VERSIONS[kind]
        ray = kind in RAY_FILES
        validator = crd_validator(RAY_FILES[kind]) if ray else Draft7Validator(schemas[kind])
        assert errors(validator, document) == [], kind


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("NetworkPolicy", "/spec/podSelector/matchlabels", {}),
        ("NetworkPolicy", "/spec/ingress/0/form", []),
        ("NetworkPolicy", "/spec/ingres", []),
        ("PodDisruptionBudget", "/spec/maxUnavailable", 1),
        ("PodDisruptionBudget", "/spec/minAvailable", "50%"),
        ("ConfigMap", "/data/AWS_DEFAULT_REGION", 1),
    ],
)
def test_a_spoilt_core_document_is_found(kind: str, path: str, value: Any):
    document = by_kind(render(BASE), kind)[0]
    apply(document, {"op": "add", "path": path, "value": value})
    assert len(errors(Draft7Validator(core_schemas()[kind]), document)) == 1


@pytest.mark.parametrize("overlay", ["../base", "../monitoring", *OVERLAYS])
def test_kustomize_renders_the_same(overlay: str):
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    folder = (CLUSTER / "overlays" / overlay).resolve()
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def ordered(documents: Any) -> list[Any]:
        return sorted(documents, key=lambda each: (each["kind"], each["metadata"]["name"]))

    assert ordered(yaml.safe_load_all(done.stdout)) == ordered(render(folder))


def test_a_patch_that_cannot_be_applied_is_refused():
    document = {"a": [{"b": 1}], "c/d": 2}
    for operation, expected in [
        ({"op": "add", "path": "/a/-", "value": 3}, {"a": [{"b": 1}, 3], "c/d": 2}),
        ({"op": "remove", "path": "/a/1"}, {"a": [{"b": 1}], "c/d": 2}),
        ({"op": "test", "path": "/a/0/b", "value": 1}, {"a": [{"b": 1}], "c/d": 2}),
        ({"op": "replace", "path": "/c~1d", "value": 4}, {"a": [{"b": 1}], "c/d": 4}),
    ]:
        apply(document, operation)
        assert document == expected
    for path, kind in [("/a/0/b", "test"), ("/a/7", "remove"), ("/e", "replace"), ("/e/f", "add")]:
        with pytest.raises(ValueError, match=f"{kind} of {path}: "):
            apply(document, {"op": kind, "path": path, "value": 9})


def test_pods_carry_the_labels_that_policies_and_budgets_select(rendered: list[Any]):
    for kind, component in COMPONENTS.items():
        document = one(rendered, kind)
        assert document["metadata"]["labels"] == {PART: "harmonica", COMPONENT: component}
        for template in templates(document).values():
            assert template["metadata"]["labels"] == {PART: "harmonica", COMPONENT: component}


def test_kuberay_s_own_probes_stay():
    """It gives a Ray container those of raylet, GCS and proxy, unless there is one already."""
    for kind in RAY_FILES:
        for template in templates(one(render(BASE), kind)).values():
            (container,) = template["spec"]["containers"]
            assert not [field for field in container if field.endswith("Probe")]


def test_workers_scale_between_bounds(rendered: list[Any]):
    for kind in RAY_FILES:
        for group in cluster_spec(one(rendered, kind))["workerGroupSpecs"]:
            bounds = [group[name] for name in ("minReplicas", "replicas", "maxReplicas")]
            assert bounds == sorted(bounds), group["groupName"]
    assert cluster_spec(one(rendered, "RayCluster"))["enableInTreeAutoscaling"] is True


def test_the_cpu_overlay_fits_a_small_machine():
    documents = render(CLUSTER / "overlays" / "cpu-test")
    for kind in RAY_FILES:
        assert templates(one(documents, kind)).keys() == {"head", "cpu-workers"}
    text = yaml.safe_dump_all(documents)
    assert "gpu" not in text


def test_the_gpu_overlay_takes_gpus_and_keys():
    documents = render(CLUSTER / "overlays" / "gpu")
    for kind in RAY_FILES:
        for name, template in templates(one(documents, kind)).items():
            pod, (container,) = template["spec"], template["spec"]["containers"]
            assert container["image"].startswith("registry.example.com/harmonica-ray:")
            limits = container["resources"]["limits"]
            assert limits.get("nvidia.com/gpu") == ("1" if name == "gpu-workers" else None)
            assert ("nodeSelector" in pod) == ("tolerations" in pod) == (name == "gpu-workers")
            keys = {"secretRef": {"name": "harmonica-api-keys"}}
            assert (keys in container["envFrom"]) == (kind != "RayJob")
    job = one(documents, "RayJob")
    gpus = next(g for g in cluster_spec(job)["workerGroupSpecs"] if g["groupName"] == "gpu-workers")
    train = workflow(job).train
    assert train.use_gpu and train.num_workers == gpus["replicas"]
    service = one(documents, "RayService")
    gpus = next(g for g in cluster_spec(service)["workerGroupSpecs"] if g["groupName"] == "gpu-workers")
    serve = served(service).serve
    assert serve.use_gpu and serve.max_replicas == gpus["maxReplicas"]


def workflow(job: Any) -> WorkflowConfig:
    _, program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "workflow.py"
    return parse(arguments, PRESETS, program)


def served(service: Any) -> ServeArgs:
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert serve_errors(config) == []
    return ServeArgs.model_validate(config["applications"][0]["args"])


def test_entrypoints_and_arguments_are_read_by_their_parsers(rendered: list[Any]):
    assert workflow(one(rendered, "RayJob")).storage_path.startswith("s3://")
    served(one(rendered, "RayService"))


def test_secrets_are_named_and_never_given(rendered: list[Any]):
    assert by_kind(rendered, "Secret") == []
    for kind in RAY_FILES:
        assert cluster_spec(one(rendered, kind))["authOptions"] == {"mode": "token"}
        for template in templates(one(rendered, kind)).values():
            for variable in template["spec"]["containers"][0].get("env", ()):
                assert not any(word in variable["name"] for word in ("KEY", "SECRET", "TOKEN", "PASSWORD"))


def test_every_manifest_is_in_the_base():
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"]
    assert {*listed, "kustomization.yaml"} == {path.name for path in BASE.iterdir()}
    assert KUBERAY_FILES.keys() <= set(listed)


def test_the_commands_of_the_pages_take_what_they_say():
    """`kubectl apply -k FOLDER -l SELECTOR`: a route takes its own component, and what has none."""
    text = (CLUSTER / "README.md").read_text()
    taken = []
    for folder, excluded in re.findall(r"kubectl apply -k (\S+) -l '\S+ notin \((.*)\)'", text):
        out = set(excluded.split(", "))
        assert out < set(COMPONENTS.values())
        documents = render(CLUSTER.parent / folder)
        kept = [d for d in documents if d["metadata"].get("labels", {}).get(COMPONENT) not in out]
        (cluster,) = (d for d in kept if d["kind"] in RAY_FILES)
        taken.append(cluster["kind"])
        assert {d["kind"] for d in kept} == VERSIONS.keys() - RAY_FILES.keys() | {cluster["kind"]}
    assert taken == ["RayCluster", "RayJob", "RayService"]
    assert render(CLUSTER / "monitoring") and "kubectl apply -k cluster/monitoring " in text
