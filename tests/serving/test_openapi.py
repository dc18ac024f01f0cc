"""The endpoint's document: it says what the endpoint does, and answers are as it says."""

import json

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tiny_dit import make_artifact, write_model
from tiny_engine import make_engine

from harmonica.models.loading import load_model
from pipelines.serving.images_api import create_app

PATH = "/v1/images/generations"
EDITS = "/v1/images/edits"
PATHS = {PATH, EDITS, "/v1/models", "/v1/models/{model}", "/v1/routers", "/healthz", "/livez", "/readyz"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    return make_engine(load_model(model), make_artifact(model))


@pytest.fixture(scope="module")
def client(source):
    with TestClient(create_app(source), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


def validator(document, schema):
    """Of a part of the document, which may refer to others."""
    return Draft202012Validator(schema | {"components": document["components"]})


def check(document, method, path, answer):
    """The answer's status is documented, and its body is as documented."""
    described = document["paths"][path][method]["responses"]
    assert str(answer.status_code) in described, (answer.status_code, answer.text[:300])
    content = described[str(answer.status_code)]["content"]
    kind = answer.headers["content-type"].split(";")[0]
    assert kind in content, kind
    checked = validator(document, content[kind]["schema"])
    if kind == "application/json":
        checked.validate(answer.json())
    else:
        for block in answer.text.strip().split("\n\n"):
            event = dict(line.split(": ", 1) for line in block.split("\n"))
            checked.validate(event)
            (described,) = (
                each["properties"]["data"]["contentSchema"]
                for each in content[kind]["schema"]["oneOf"]
                if each["properties"]["event"]["const"] == event["event"]
            )
            validator(document, described).validate(json.loads(event["data"]))


def test_every_schema_is_one_and_every_reference_leads_somewhere(document):
    schemas = document["components"]["schemas"]
    for name, schema in schemas.items():
        Draft202012Validator.check_schema(schema)
        assert name not in ("HTTPValidationError", "ValidationError")
    references = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert references <= schemas.keys()
    assert document["paths"].keys() == PATHS


@pytest.mark.parametrize("path", sorted(PATHS))
def test_every_operation_says_what_it_does_and_never_422(document, path):
    for operation in document["paths"][path].values():
        assert operation["description"] and "200" in operation["responses"]
        assert "422" not in operation["responses"]


def test_answers_are_as_documented(client, document):
    for path in ("/v1/models", "/v1/routers", "/healthz"):
        check(document, "get", path, client.get(path))
    check(document, "get", "/v1/models/{model}", client.get("/v1/models/tiny"))
    check(document, "get", "/v1/models/{model}", client.get("/v1/models/huge"))
    for body in (
        {"prompt": "Bag"},
        {"prompt": "Bag", "stream": True, "partial_images": 2, "progress": True},
        {"prompt": "cat"},
        {"prompt": "Bag", "model": "huge"},
        {"prompt": "x" * 70_000},
    ):
        check(document, "post", PATH, client.post(PATH, json=body))


FIELDS = {
    "prompt": st.sampled_from(["Bag", "7", "cat", "", "x" * 5000]) | st.text(max_size=20),
    "n": st.integers(-1, 6) | st.none(),
    "seed": st.integers(-1, 2**63) | st.none(),
    "size": st.sampled_from(["auto", "28x28", "1x1"]),
    "model": st.sampled_from(["tiny", "dall-e-3", ""]) | st.none(),
    "quality": st.sampled_from(["auto", "low", "high", "hd", "best"]) | st.none(),
    "output_format": st.sampled_from(["png", "jpeg", "webp", "gif"]) | st.none(),
    "output_compression": st.integers(-1, 101) | st.none(),
    "stream": st.booleans() | st.none(),
    "partial_images": st.integers(-1, 4) | st.none(),
    "progress": st.booleans(),
    "num_inference_steps": st.integers(0, 40) | st.none(),
    "guidance_scale": st.floats(0, 60) | st.none(),
    "negative_prompt": st.text(max_size=5) | st.none(),
    "user": st.none() | st.booleans() | st.text(max_size=3),
    "sed": st.integers(),
}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
REQUESTS = st.fixed_dictionaries(
    {"prompt": FIELDS["prompt"]}, optional={name: FIELDS[name] for name in FIELDS if name != "prompt"}
)
WRONG = st.dictionaries(st.sampled_from(sorted(FIELDS)), ANYTHING, max_size=4)


@settings(
    max_examples=150,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(body=REQUESTS | WRONG)
def test_no_request_breaks_it_and_what_the_document_forbids_is_refused(client, document, body):
    answer = client.post(PATH, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
    check(document, "post", PATH, answer)
    described = document["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]["schema"]
    if answer.status_code == 200:
        validator(document, described).validate(body)


def test_keys_are_documented_where_there_are_any(source):
    with TestClient(create_app(source, keys=("secret",))) as client:
        document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    closed = {
        path
        for path, operations in document["paths"].items()
        for op in operations.values()
        if "security" in op
    }
    assert closed == PATHS - {"/healthz", "/livez", "/readyz"}
    assert "secret" not in json.dumps(document)
