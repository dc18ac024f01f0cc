"""The YAML in cluster/ against the schemas of those who read it: KubeRay and Ray Serve."""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from pydantic import ValidationError
from ray._common.utils import import_attr

import harmonica
from pipelines.serving import proxy
from pipelines.serving.serve_args import ServeArgs

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BASE = CLUSTER / "base"
CRDS = ROOT.parent / "shared" / "kuberay"
KUBERAY_FILES = {
    "raycluster.yaml": "ray.io_rayclusters.yaml.gz",
    "rayjob.yaml": "ray.io_rayjobs.yaml.gz",
    "rayservice.yaml": "ray.io_rayservices.yaml.gz",
}
RAY_CLUSTER_SPEC = {
    "raycluster.yaml": ("spec",),
    "rayjob.yaml": ("spec", "rayClusterSpec"),
    "rayservice.yaml": ("spec", "rayClusterConfig"),
}


def load(name: str, folder: Path = BASE) -> Any:
    return yaml.safe_load((folder / name).read_text())


def at(document: Any, *path: str | int) -> Any:
    for key in path:
        document = document[key]
    return document


def json_schema(schema: Any) -> Any:
    """A CRD's openAPIV3Schema as JSON Schema that, like the API server, knows every field it lists."""
    if isinstance(schema, list):
        return [json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    converted = {
        key: {name: json_schema(field) for name, field in value.items()}
        if key == "properties"
        else value
        if key in ("default", "enum", "example", "required")
        else json_schema(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key not in ("description", "format", "nullable")
    }
    if "properties" in converted and "additionalProperties" not in converted:
        converted["additionalProperties"] = schema.get("x-kubernetes-preserve-unknown-fields", False)
    if schema.get("nullable"):
        return {"anyOf": [converted, {"type": "null"}]}
    return converted


def crd_schema(file: str) -> Any:
    """Of the resource of a file in cluster/base; the test is skipped where KubeRay's CRD is not."""
    crd_path = CRDS / KUBERAY_FILES[file]
    if not crd_path.exists():
        pytest.skip(f"KubeRay's CRD {crd_path.name} is not in ../shared/kuberay")
    with gzip.open(crd_path) as stream:
        crd = yaml.load(stream, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = json_schema(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return schema


def crd_validator(file: str) -> Draft7Validator:
    return Draft7Validator(crd_schema(file))


def errors(validator: Draft7Validator, document: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def serve_errors(document: Any) -> list[str]:
    """What Serve refuses, and the misspelt fields it would pass over in silence."""
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    found = sorted(document.keys() - ServeDeploySchema.model_fields.keys())
    for application in document["applications"]:
        found += sorted(application.keys() - ServeApplicationSchema.model_fields.keys())
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        found += [".".join(map(str, detail["loc"])) for detail in error.errors()]
    return found


@pytest.mark.parametrize("file", KUBERAY_FILES)
def test_manifest_is_what_kuberay_reads(file):
    assert errors(crd_validator(file), load(file)) == []


def misspell_start_params(spec: Any) -> None:
    spec["headGroupSpec"]["raystartparams"] = spec["headGroupSpec"].pop("rayStartParams")


def spell_out_replicas(spec: Any) -> None:
    spec["workerGroupSpecs"][0]["replicas"] = "one"


def drop_max_replicas(spec: Any) -> None:
    del spec["workerGroupSpecs"][0]["maxReplicas"]


def misname_container_field(spec: Any) -> None:
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["envfrom"] = []


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (misspell_start_params, "raystartparams"),
        (spell_out_replicas, "replicas"),
        (drop_max_replicas, "maxReplicas"),
        (misname_container_field, "envfrom"),
    ],
)
def test_a_spoilt_manifest_is_found(spoil: Callable[[Any], None], named: str):
    manifest = load("raycluster.yaml")
    spoil(manifest["spec"])
    found = errors(crd_validator("raycluster.yaml"), manifest)
    assert len(found) == 1 and named in found[0]


@pytest.mark.parametrize("file", KUBERAY_FILES)
def test_pods_agree_with_one_another_and_with_the_code(file):
    spec = at(load(file), *RAY_CLUSTER_SPEC[file])
    groups = {group["groupName"]: group["template"]["spec"] for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu-workers", "gpu-workers"}
    assert spec["authOptions"] == {"mode": "token"}
    for name, pod in {"head": spec["headGroupSpec"]["template"]["spec"], **groups}.items():
        (container,) = pod["containers"]
        has_gpu = name == "gpu-workers"
        image = f"harmonica-ray:{harmonica.__version__}" + ("-gpu" if has_gpu else "")
        assert container["image"] == image
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == has_gpu
        sources = [next(iter(source.items())) for source in container["envFrom"]]
        assert [(kind, source["name"]) for kind, source in sources] == [
            ("configMapRef", "harmonica-settings"),
            ("secretRef", "harmonica-storage"),
        ]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_settings_are_strings_and_none_is_a_secret():
    settings = load("settings.yaml")
    assert (settings["apiVersion"], settings["kind"]) == ("v1", "ConfigMap")
    assert settings["metadata"] == {"name": "harmonica-settings"}
    assert {"MLFLOW_TRACKING_URI", "GLOO_SOCKET_IFNAME"} <= settings["data"].keys()
    for name, value in settings["data"].items():
        assert isinstance(value, str) and "SECRET" not in name and "KEY" not in name


def test_the_image_runs_as_an_ordinary_user():
    users = [
        line for line in (CLUSTER / "Containerfile").read_text().splitlines() if line.startswith("USER ")
    ]
    assert users[-1] == "USER ray"


def test_ray_is_the_pinned_one_everywhere():
    pins = (CLUSTER / "constraints.txt").read_text().splitlines()
    ray_version = next(pin.removeprefix("ray==") for pin in pins if pin.startswith("ray=="))
    assert f"RAY_TAG={ray_version}-" in (CLUSTER / "Containerfile").read_text()
    for file, path in RAY_CLUSTER_SPEC.items():
        assert at(load(file), *path)["rayVersion"] == ray_version


def test_constraints_fit_machines_with_and_without_cuda():
    lines = (CLUSTER / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(pin.count("==") == 1 for pin in pins)
    assert not [pin for pin in pins if "+" in pin or pin.startswith(("nvidia-", "cuda-", "triton"))]


def serve_config() -> Any:
    return yaml.safe_load(load("rayservice.yaml")["spec"]["serveConfigV2"])


def test_serve_config_is_what_serve_reads():
    config = serve_config()
    assert serve_errors(config) == []
    (application,) = config["applications"]
    assert application["name"] == "harmonica"
    assert application["route_prefix"] == "/"
    assert application["import_path"] == "pipelines.serve:build"
    assert ServeArgs.model_validate(application["args"]).serve.max_replicas == 3
    (container,) = load("rayservice.yaml")["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert import_attr(environment[proxy.CALLBACK]) is proxy.middlewares


def test_a_spoilt_serve_config_is_found():
    config = serve_config()
    config["proxy_location"] = "Everywhere"
    config["applications"][0]["rout_prefix"] = config["applications"][0].pop("route_prefix")
    assert serve_errors(config) == ["rout_prefix", "proxy_location"]


def test_job_runs_the_workflow_of_the_image():
    spec = load("rayjob.yaml")["spec"]
    assert spec["entrypoint"].startswith("python workflow.py ")
    folder = yaml.safe_load(spec["runtimeEnvYAML"])["working_dir"].removeprefix("local://")
    assert f"WORKDIR {folder}\n" in (CLUSTER / "Containerfile").read_text()


def test_serve_build_writes_a_configuration_that_serve_reads(tmp_path):
    command = [sys.executable, "-m", "ray.serve.scripts", "build", "pipelines.serving.application:app"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}
    subprocess.run(
        [*command, "-o", "serve.yaml"], cwd=tmp_path, env=environment, check=True, capture_output=True
    )
    document = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    assert serve_errors(document) == []
    deployments = {each["name"]: each for each in document["applications"][0]["deployments"]}
    assert deployments.keys() == {"Api", "Sampler"}
    for deployment in deployments.values():
        assert deployment["logging_config"]["encoding"] == "JSON"
