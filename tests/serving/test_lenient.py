"""`serve.lenient`: clients that always ask for another model, size and kind of answer get what there is."""

import base64
import json

import openai
import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator
from tiny_dit import make_artifact, write_model
from tiny_engine import make_engine

from harmonica.models.loading import load_model
from pipelines.serving.images_api import create_app

PATH = "/v1/images/generations"
ALWAYS = {"model": "gpt-image-1", "size": "512x512", "response_format": "url"}


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    engine = make_engine(load_model(model), make_artifact(model))
    made = {
        lenient: TestClient(create_app(engine, lenient=lenient), raise_server_exceptions=False)
        for lenient in (True, False)
    }
    with made[True], made[False]:
        yield made


def ask(client, **body):
    return client.post(PATH, json={"prompt": "Bag", "seed": 3} | body)


def test_what_is_not_followed_is_named_and_the_picture_is_the_model_s_own(clients):
    own = ask(clients[False]).json()
    assert own["warnings"] == [] and "url" not in own["data"][0]
    answer = ask(clients[True], **ALWAYS).json()
    said = {each["param"]: each["message"] for each in answer["warnings"]}
    assert said == {
        "model": "model is 'gpt-image-1': this endpoint serves 'tiny', which has generated the images",
        "size": "size is '512x512': this model generates 28x28, and has generated that",
        "response_format": "response_format is 'url': this endpoint keeps no pictures, so url is a data URL "
        "that holds the picture",
    }
    assert answer["size"] == "28x28"
    (entry,) = answer["data"]
    assert entry.keys() == {"url", "revised_prompt", "router_version"}
    assert entry["url"] == "data:image/png;base64," + own["data"][0]["b64_json"]


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_a_data_url_says_what_it_holds(clients, kind):
    url = ask(clients[True], response_format="url", output_format=kind).json()["data"][0]["url"]
    head, _, data = url.partition(",")
    assert head == f"data:image/{kind};base64" and base64.b64decode(data, validate=True)


@pytest.mark.parametrize(("name", "value"), [*ALWAYS.items(), ("input_fidelity", "high")])
def test_without_it_each_is_refused_by_name(clients, name, value):
    answer = ask(clients[False], **{name: value})
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == name


def test_what_is_not_known_is_named(clients):
    answer = ask(clients[True], sed=4, input_fidelity="high", **{"x" * 500: 1}).json()
    params = [each["param"] for each in answer["warnings"]]
    assert params == ["sed", "input_fidelity", "x" * 100]
    many = ask(clients[True], **{f"field{i}": i for i in range(100)}).json()
    assert len(many["warnings"]) == 20


def test_who_asks_for_what_there_is_is_warned_of_nothing(clients):
    for body in ({}, {"model": "tiny", "size": "28x28", "response_format": "b64_json"}, {"size": "auto"}):
        answer = ask(clients[True], **body).json()
        assert answer["warnings"] == [] and answer["data"][0]["b64_json"]


@pytest.mark.parametrize(
    "body",
    [{"prompt": "cat"}, {"prompt": " "}, {"n": 99}, {"seed": -1}, {"size": 512}, {"response_format": "file"}],
)
def test_what_is_wrong_everywhere_is_still_refused(clients, body):
    assert ask(clients[True], **body).status_code == 400


def test_a_stream_warns_with_the_image(clients):
    text = ask(clients[True], stream=True, partial_images=1, **ALWAYS).text
    events = [
        json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data")
    ]
    assert [each["type"].rpartition(".")[2] for each in events] == ["partial_image", "completed"]
    assert [each["param"] for each in events[-1]["warnings"]] == ["model", "size", "response_format"]
    assert "events hold b64_json" in events[-1]["warnings"][2]["message"] and events[-1]["b64_json"]


def test_the_official_client_of_a_program_that_knows_no_other_model(clients):
    api = openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=clients[True])
    image = api.images.generate(prompt="Bag", model="dall-e-3", size="1024x1024", response_format="url")
    assert image.data[0].url.startswith("data:image/png;base64,") and image.data[0].b64_json is None


def test_each_way_is_documented(clients):
    asked = {"prompt": "Bag", **ALWAYS, "sed": 1}
    for lenient, client in clients.items():
        document = client.get("/openapi.json").json()
        operation = document["paths"][PATH]["post"]
        body = operation["requestBody"]["content"]["application/json"]["schema"]
        checked = Draft202012Validator(body | {"components": document["components"]})
        assert checked.is_valid(asked) == lenient
        if lenient:
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            answered = Draft202012Validator(schema | {"components": document["components"]})
            answered.validate(client.post(PATH, json=asked).json())
